"""A progress bar on stderr, if that is a terminal."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

B = TypeVar("B", bound="Bar")

WIDTH = 30  # characters


class Bar:
    """A progress bar that redraws its line; the line is erased at the end of a `with` block."""

    def __init__(self, shown: bool = True) -> None:
        self._shown = shown and sys.stderr.isatty()

    def __enter__(self: B) -> B:
        return self

    def __exit__(self, *error: object) -> None:
        self._draw("")

    def show(self, label: str, done: int, total: int, text: str) -> None:
        """Draws `label`, the bar with `done` of `total` filled, and `text`."""
        self._draw(f"{label}[{'#' * (WIDTH * done // max(total, 1)):{WIDTH}}] {text}")

    def _draw(self, line: str) -> None:
        if self._shown:
            sys.stderr.write(f"\r\x1b[K{line}")
            sys.stderr.flush()


class StepBar(Bar):
    """A pipeline callback that draws a bar of each stage's steps and measures `seconds` by stage."""

    def __init__(self, label: str = "", shown: bool = True):
        super().__init__(shown)
        self.seconds: dict[str, float] = {}
        self._label, self._last = label, time.perf_counter()

    def __call__(self, stage: str, done: int, steps: int, denoised: Tensor | None) -> None:
        now = time.perf_counter()
        self.seconds[stage] = round(self.seconds.get(stage, 0.0) + now - self._last, 4)
        self._last = now
        self.show(f"{self._label}{stage:8}", done, steps, f"{done}/{steps}")
