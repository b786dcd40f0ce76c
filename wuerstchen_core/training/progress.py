"""The progress bar of a run, whose rate and remaining time leave out what happens between steps."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from .checkpoint import newest_step
from .report import StepTimes


@contextmanager
def interruptible(bar: tqdm[int], folder: Path) -> Iterator[None]:
    """Closes a bar at the end. An interrupt gets a message with the step from which a new start goes on."""
    try:
        yield
    except KeyboardInterrupt:
        if bar.disable:  # not the main process
            raise
        step = newest_step(folder)
        goes_on = (
            f"resumes from step {step} and repeats {bar.n - step} steps"
            if step
            else "starts again, since there is no checkpoint yet"
        )
        raise KeyboardInterrupt(f"interrupted after step {bar.n}: the same command {goes_on}") from None
    finally:
        bar.close()


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
