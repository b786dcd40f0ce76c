"""Recorded noise for samplers, and a recorder of their steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from wuerstchen_core.diffusion.samplers import NoiseSource


def replay(*noises: Tensor) -> NoiseSource:
    """Returns a source of the recorded noise, in order."""
    left = iter(noises)
    return lambda like: next(left)


def recorder(into: list[Tensor]) -> Callable[[int, int, Tensor, Tensor], None]:
    """Returns a callback that appends each step's x."""
    return lambda step, steps, x, denoised: into.append(x)


class RecordedTokenNoise:
    """The original's random numbers; `torch.multinomial` compares exponentials."""

    def __init__(self, uniforms: Tensor, exponentials: Tensor | None):
        self.uniforms: Iterator[Tensor] = iter(uniforms)
        self.exponentials: Iterator[Tensor] = iter(exponentials if exponentials is not None else ())

    def uniform(self, like: Tensor) -> Tensor:
        return next(self.uniforms)

    def pick(self, probabilities: Tensor) -> Tensor:
        rows = probabilities.movedim(1, -1)
        return (rows.flatten(0, 2) / next(self.exponentials)).argmax(dim=-1).view(rows.shape[:3])
