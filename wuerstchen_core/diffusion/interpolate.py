"""The way from one latent or text to another."""

from __future__ import annotations

import torch
from torch import Tensor

PICTURE = (-3, -2, -1)  # latents [B, c, h, w] turn as a whole
TOKEN = (-1,)  # text states [B, n, c] turn token by token
SHORTEST_SINE = 1e-3  # of the angle between two vectors that still say in which plane to turn


def slerp(a: Tensor, b: Tensor, fraction: float, dims: tuple[int, ...] = PICTURE) -> Tensor:
    """The point at `fraction` of the way from a to b: the direction turns (Shoemake 1985), the length changes evenly.

    A vector is what spans `dims`: PICTURE for latents in the units that noise is added in, TOKEN for text states. The
    ends are a and b exactly. Vectors that are parallel, opposite or zero go straight. Raises ValueError where the
    shapes differ or the fraction is not from 0 to 1.
    """
    if a.shape != b.shape:
        raise ValueError(
            f"there is no way from {_shape(a)} to {_shape(b)}: give two of one shape (pictures of one size, texts of "
            "similar length)"
        )
    check_fraction(fraction)
    if fraction in (0, 1):
        return b if fraction else a
    start, end = a.float(), b.float()
    length, length_end = (torch.linalg.vector_norm(x, dim=dims, keepdim=True) for x in (start, end))
    unit, unit_end = start / length, end / length_end  # of a zero vector NaN, which the last line does not take
    angle = 2 * torch.atan2(
        torch.linalg.vector_norm(unit - unit_end, dim=dims, keepdim=True),
        torch.linalg.vector_norm(unit + unit_end, dim=dims, keepdim=True),
    )
    turned = (((1 - fraction) * angle).sin() * unit + (fraction * angle).sin() * unit_end) / angle.sin()
    straight = torch.lerp(start, end, fraction)
    return torch.where(angle.sin() > SHORTEST_SINE, turned * length.lerp(length_end, fraction), straight).to(a.dtype)


def check_fraction(fraction: float) -> None:
    """Raise ValueError unless there is such a point between two ends."""
    if not 0 <= fraction <= 1:
        raise ValueError(f"a fraction of {fraction} cannot be used: choose a number from 0 (the first) to 1 (the last)")


def _shape(x: Tensor) -> str:
    return "x".join(map(str, x.shape))
