"""A progress bar on stderr, if that is a terminal."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor
    from typing_extensions import Self

WIDTH = 30  # characters


class Bar:
    """A progress bar on one line, which is erased at the end of a `with` block."""

    def __init__(self, shown: bool = True) -> None:
        self._shown = shown and sys.stderr.isatty()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._draw("")

    def show(self, label: str, done: int, total: int, text: str) -> None:
        """Draws the label, a bar of which `done` of `total` are filled, and the text."""
        self._draw(f"{label}[{'#' * (WIDTH * done // max(total, 1)):{WIDTH}}] {text}")

    def _draw(self, line: str) -> None:
        if self._shown:
            sys.stderr.write(f"\r\x1b[K{line}")
            sys.stderr.flush()


class StepBar(Bar):
    """A callback for the pipeline: draws a bar for the steps of each stage, and measures its `seconds`."""

    def __init__(self, label: str = "", shown: bool = True):
        super().__init__(shown)
        self.seconds: dict[str, float] = {}
        self._label, self._last = label, time.perf_counter()

    def __call__(self, stage: str, done: int, steps: int, denoised: Tensor | None) -> None:
        now = time.perf_counter()
        self.seconds[stage] = round(self.seconds.get(stage, 0.0) + now - self._last, 4)
        self._last = now
        self.show(f"{self._label}{stage:8}", done, steps, f"{done}/{steps}")
