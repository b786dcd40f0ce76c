"""Reads golden files: inputs, weights and outputs computed with the original code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from wuerstchen_core.checkpoints.key_maps import split_attention

FOLDER = Path(__file__).parents[1] / "golden"


def tuples(value: Any) -> Any:
    """Converts JSON lists to tuples, as in the params dataclasses."""
    return tuple(tuples(item) for item in value) if isinstance(value, list) else value


class Golden:
    """A golden file; `golden["in/x"]` reads a tensor."""

    def __init__(self, name: str):
        self.file = safe_open(FOLDER / f"{name}.safetensors", "pt")
        self.config: dict[str, Any] = {k: tuples(v) for k, v in json.loads(self.file.metadata()["config"]).items()}

    def __getitem__(self, key: str) -> Tensor:
        return self.file.get_tensor(key)

    def under(self, prefix: str) -> dict[str, Tensor]:
        """Returns all tensors whose key starts with `prefix`, which is removed."""
        return {key[len(prefix) :]: self[key] for key in self.file.keys() if key.startswith(prefix)}  # noqa: SIM118

    def weights(self, prefix: str = "weights/") -> dict[str, Tensor]:
        """Returns a network's weights with our key names."""
        return split_attention(self.under(prefix))

    def sizes(self) -> dict[str, Any]:
        """Returns the network's sizes without its dropout, since the golden runs had none."""
        return {key: value for key, value in self.config.items() if key != "dropout"}


def assert_near(value: Tensor, expected: Tensor, tolerance: float) -> None:
    """Asserts equal shapes and a largest absolute difference of `tolerance`."""
    torch.testing.assert_close(value, expected, rtol=0, atol=tolerance)
