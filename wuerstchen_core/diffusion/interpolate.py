"""Spherical interpolation between latents or text states."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.numbers import to_float

PICTURE = (-3, -2, -1)  # latents [B, c, h, w]: one vector per picture
TOKEN = (-1,)  # text states [B, n, c]: one vector per token
MIN_SINE = 1e-3  # of the angle between two vectors; with less they count as parallel


def slerp(a: Tensor, b: Tensor, fraction: float, dims: tuple[int, ...] = PICTURE) -> Tensor:
    """Interpolates from a to b (Shoemake 1985): directions rotate, lengths change linearly.

    `dims` are the dimensions of a vector: PICTURE for latents in the units that noise is added in, TOKEN for text
    states. Fractions 0 and 1 return a and b exactly. Vectors that are parallel, opposite or zero are interpolated
    linearly. Raises ValueError if the shapes differ or the fraction is not from 0 to 1.
    """
    if a.shape != b.shape:
        shapes = " and ".join("x".join(map(str, x.shape)) for x in (a, b))
        raise ValueError(f"cannot interpolate shapes {shapes}: give pictures of one size, or texts of similar length")
    check_fraction(fraction)
    if fraction in (0, 1):
        return b if fraction else a
    start, end = a.float(), b.float()
    length, length_end = (torch.linalg.vector_norm(x, dim=dims, keepdim=True) for x in (start, end))
    unit, unit_end = start / length, end / length_end  # NaN for zero vectors, which torch.where below discards
    angle = 2 * torch.atan2(
        torch.linalg.vector_norm(unit - unit_end, dim=dims, keepdim=True),
        torch.linalg.vector_norm(unit + unit_end, dim=dims, keepdim=True),
    )
    rotated = (((1 - fraction) * angle).sin() * unit + (fraction * angle).sin() * unit_end) / angle.sin()
    linear = torch.lerp(start, end, fraction)
    return torch.where(angle.sin() > MIN_SINE, rotated * length.lerp(length_end, fraction), linear).to(a.dtype)


def check_fraction(fraction: float) -> None:
    """Raises ValueError unless the fraction is from 0 to 1."""
    if not 0 <= to_float("fraction", fraction) <= 1:
        raise ValueError(f"fraction {fraction} cannot be used: choose a number from 0 (the first) to 1 (the second)")
