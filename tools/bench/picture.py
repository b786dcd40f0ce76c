"""Text to picture by fewer steps than asked for: how long those left out would have taken."""

from __future__ import annotations

import statistics

import torch
from PIL import Image
from torch import Tensor

from wuerstchen_core.inference.images import to_pixels

from .setting import Clock, Setting

SHORT = 3  # steps of each stage that are done: the first, which has more to do, and two like all others


def steps_done(setting: Setting, whole: tuple[int, int]) -> tuple[int, int]:
    """How many steps of Stage C and of Stage B are done of `whole`."""
    prior, decoder = whole
    return (prior, decoder) if setting.full else (min(SHORT, prior), min(SHORT, decoder))


class Steps:
    """Takes the time of the steps of one picture's two samplers."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._seconds: dict[str, list[float]] = {"prior": [], "decoder": []}
        self._last = clock()

    def begin(self) -> None:
        """A sampler begins."""
        self._last = self._clock()

    def done(self, stage: str) -> None:
        """A step of a stage is done."""
        now = self._clock()
        self._seconds[stage].append(now - self._last)
        self._last = now

    def left_out(self, whole: tuple[int, int]) -> float:
        """Seconds that the steps would have taken that are missing from `whole`: each the median of the later ones."""
        seconds = 0.0
        for steps, done in zip(whole, self._seconds.values(), strict=True):
            seconds += (steps - len(done)) * statistics.median(done[1:] or done)
        return seconds


def pixels(pictures: list[Image.Image]) -> Tensor:
    """Pictures as one tensor [B, 3, H, W]."""
    return torch.cat([to_pixels(picture) for picture in pictures])
