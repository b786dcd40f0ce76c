"""Reads the golden files: inputs, weights and outputs computed with the original code."""

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
    """JSON lists as tuples, which is how the params dataclasses hold them."""
    return tuple(tuples(item) for item in value) if isinstance(value, list) else value


class Golden:
    """One golden file; `golden["in/x"]` reads a tensor when it is asked for."""

    def __init__(self, name: str):
        self.file = safe_open(FOLDER / f"{name}.safetensors", "pt")
        self.config: dict[str, Any] = {k: tuples(v) for k, v in json.loads(self.file.metadata()["config"]).items()}

    def __getitem__(self, key: str) -> Tensor:
        return self.file.get_tensor(key)

    def under(self, prefix: str) -> dict[str, Tensor]:
        """All tensors whose key starts with `prefix`, without it."""
        return {key[len(prefix) :]: self[key] for key in self.file.keys() if key.startswith(prefix)}  # noqa: SIM118

    def weights(self, prefix: str = "weights/") -> dict[str, Tensor]:
        """A network's weights, in our key names."""
        return split_attention(self.under(prefix))

    def sizes(self) -> dict[str, Any]:
        """The network's sizes; its dropout is left out, as the golden runs did."""
        return {key: value for key, value in self.config.items() if key != "dropout"}


def assert_near(value: Tensor, expected: Tensor, tolerance: float) -> None:
    """Equal in shape, and nowhere further apart than `tolerance` (absolute)."""
    torch.testing.assert_close(value, expected, rtol=0, atol=tolerance)
