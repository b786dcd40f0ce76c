"""How far a command is: seconds by stage, and a line that counts."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

BAR = 30  # characters of the progress bar
PAUSE = 30.0  # seconds between two lines where there is no terminal


class Bar:
    """A line on stderr that is written over, if that is a terminal."""

    def __init__(self) -> None:
        self._shown = sys.stderr.isatty()

    def show(self, label: str, done: int, total: int, words: str) -> None:
        """Show how much of `total` is done."""
        if self._shown:
            self._write(f"{label}[{'#' * (BAR * done // max(total, 1)):{BAR}}] {words}")

    def clear(self) -> None:
        """Take the line away."""
        if self._shown:
            self._write("")

    def _write(self, line: str) -> None:
        sys.stderr.write(f"\r\x1b[K{line}")
        sys.stderr.flush()


class Lines:
    """A line on stderr now and then, if that is no terminal but a file or another program."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def show(self, words: str) -> None:
        """Show how far the work is, unless it was shown lately."""
        if not sys.stderr.isatty() and time.monotonic() - self._last >= PAUSE:
            self._last = time.monotonic()
            sys.stderr.write(f"{words}\n")
            sys.stderr.flush()


class Progress:
    """The pipeline's callback: seconds by stage, and a bar that counts steps."""

    def __init__(self, label: str = ""):
        self.seconds: dict[str, float] = {}
        self._label = label
        self._last = time.perf_counter()
        self._bar = Bar()

    def __call__(self, stage: str, done: int, steps: int, denoised: Tensor | None) -> None:
        now = time.perf_counter()
        self.seconds[stage] = round(self.seconds.get(stage, 0.0) + now - self._last, 4)
        self._last = now
        self._bar.show(f"{self._label}{stage:8}", done, steps, f"{done}/{steps}")

    def clear(self) -> None:
        """Take the bar away."""
        self._bar.clear()
