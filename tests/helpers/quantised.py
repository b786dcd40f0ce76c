"""Quantises as ComfyUI does, element by element."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor


def encoded(config: dict[str, Any]) -> Tensor:
    return torch.tensor(list(json.dumps(config).encode()), dtype=torch.uint8)


def rotation(size: int) -> Tensor:
    """Returns ConvRot's matrix, element by element: a sign for each pair of base-4 digits that add up to 3."""
    digits = range((size.bit_length() - 1) // 2)
    signs = [
        [(-1) ** sum((i >> 2 * d) % 4 + (j >> 2 * d) % 4 == 3 for d in digits) for j in range(size)]
        for i in range(size)
    ]
    return torch.tensor(signs, dtype=torch.float32) / size**0.5


def int8(weight: Tensor, group: int, per_row: bool = True) -> tuple[Tensor, Tensor]:
    """Quantises as ComfyUI does: rotated in groups of `group` (0: not), with a scale for each row or one for all."""
    if group:
        weight = (weight.unflatten(1, (-1, group)) @ rotation(group).T).flatten(1)
    scale = (weight.abs().amax(1, keepdim=True) if per_row else weight.abs().max()) / 127
    return (weight / scale).round().clamp(-127, 127).to(torch.int8), scale
