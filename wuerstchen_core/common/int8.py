"""The rounding of weights to int8."""

from __future__ import annotations

import torch
from torch import Tensor


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Returns a weight [c_out, c_in] in int8, and its scales [c_out, 1] in fp32: a row's largest number becomes 127."""
    weight = weight.float()
    largest = weight.abs().amax(dim=1, keepdim=True)
    scale = torch.where(largest > 0, largest / 127, 1.0)
    return (weight / scale).round_().to(torch.int8), scale
