"""The progress bar of a run, whose rate and remaining time leave out what happens between steps."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

from .report import StepTimes


@contextmanager
def left_out(bar: tqdm[int], times: StepTimes) -> Iterator[None]:
    """Leaves the time in a `with` block out of the rate and the remaining time of a bar and of a run.

    The bar must be moved by `update`: as an iterator, it keeps times of its own.
    """
    began = time.monotonic()
    yield
    seconds = time.monotonic() - began
    times.shift(seconds)
    if not bar.disable:  # else it has no times
        bar.start_t += seconds
        bar.last_print_t += seconds
