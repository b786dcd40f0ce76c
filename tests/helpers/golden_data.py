"""Reads golden files: inputs, weights and outputs computed with the original code."""

from __future__ import annotations

import json
import lzma
from functools import cache
from typing import Any

import safetensors.torch
from torch import Tensor
from torch.testing import assert_close

from tools.golden_files import FOLDER, data_start, golden_file
from wuerstchen_core.checkpoints.key_maps import split_attention


def tuples(value: Any) -> Any:
    """Converts JSON lists to tuples, as in the params dataclasses."""
    return tuple(tuples(item) for item in value) if isinstance(value, list) else value


@cache
def manifests() -> dict[str, dict[str, Any]]:
    """Returns the facts of every published file by name: `tensors` (key: [shape, dtype]), `parameters`, `config`."""
    return json.loads(lzma.decompress((FOLDER / "manifests.json.xz").read_bytes()))


class Golden:
    """A golden file; `golden["in/x"]` reads a tensor."""

    def __init__(self, name: str):
        data = golden_file(name)
        self.tensors = safetensors.torch.load(data)
        config = json.loads(json.loads(data[8 : data_start(data)])["__metadata__"]["config"])
        self.config: dict[str, Any] = {key: tuples(value) for key, value in config.items()}

    def __getitem__(self, key: str) -> Tensor:
        return self.tensors[key].clone()

    def under(self, prefix: str) -> dict[str, Tensor]:
        """Returns all tensors whose key starts with `prefix`, which is removed."""
        return {key[len(prefix) :]: tensor for key, tensor in self.tensors.items() if key.startswith(prefix)}

    def weights(self, prefix: str = "weights/") -> dict[str, Tensor]:
        """Returns a network's weights with our key names."""
        return split_attention(self.under(prefix))

    def sizes(self) -> dict[str, Any]:
        """Returns the network's sizes without its dropout, since the golden runs had none."""
        return {key: value for key, value in self.config.items() if key != "dropout"}


def assert_near(value: Tensor, expected: Tensor, tolerance: float) -> None:
    """Asserts equal shapes and a largest absolute difference of `tolerance`."""
    assert_close(value, expected, rtol=0, atol=tolerance)
