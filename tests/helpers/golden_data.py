"""Reads golden files: inputs, weights and outputs computed with the original code."""

from __future__ import annotations

import json
import lzma
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
from torch import Tensor
from torch.testing import assert_close

from wuerstchen_core.checkpoints.key_maps import split_attention

FOLDER = Path(__file__).parents[1] / "golden"


def tuples(value: Any) -> Any:
    """Converts JSON lists to tuples, as in the params dataclasses."""
    return tuple(tuples(item) for item in value) if isinstance(value, list) else value


def pack(data: bytes) -> bytes:
    """Returns a safetensors file as golden files are stored: xz of its header and of the four byte planes of its data.

    The first bytes of all 32-bit words come first, then all second bytes, and so on: a fifth smaller than the file.
    """
    start = _data_start(data)
    return lzma.compress(data[:start] + np.frombuffer(data, np.uint8, offset=start).reshape(-1, 4).T.tobytes())


def unpack(packed: bytes) -> bytes:
    """Returns the safetensors file that was packed."""
    data = lzma.decompress(packed)
    start = _data_start(data)
    return data[:start] + np.frombuffer(data, np.uint8, offset=start).reshape(4, -1).T.tobytes()


def _data_start(data: bytes) -> int:
    return 8 + int.from_bytes(data[:8], "little")


@cache
def _file(name: str) -> bytes:
    return unpack((FOLDER / f"{name}.safetensors.xz").read_bytes())


@cache
def manifests() -> dict[str, dict[str, Any]]:
    """Returns the facts of every published file by name: `tensors` (key: [shape, dtype]), `parameters`, `config`."""
    return json.loads(lzma.decompress((FOLDER / "manifests.json.xz").read_bytes()))


class Golden:
    """A golden file; `golden["in/x"]` reads a tensor."""

    def __init__(self, name: str):
        data = _file(name)
        self.tensors = safetensors.torch.load(data)
        config = json.loads(json.loads(data[8 : _data_start(data)])["__metadata__"]["config"])
        self.config: dict[str, Any] = {key: tuples(value) for key, value in config.items()}

    def __getitem__(self, key: str) -> Tensor:
        return self.tensors[key]

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
