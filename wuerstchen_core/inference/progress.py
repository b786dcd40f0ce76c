"""A progress bar for a run, drawn by tqdm if that is installed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from .settings import Callback

TITLES = {"prior": "Stage C", "decoder": "Stage B"}


def is_interactive() -> bool:
    """True in a notebook, in an interactive Python, and if stderr is a terminal."""
    return hasattr(sys, "ps1") or bool(getattr(sys.stderr, "isatty", bool)())


@contextmanager
def progress_bar(callback: Callback | None, shown: bool | None) -> Iterator[Callback | None]:
    """Yields a callback that draws the steps of each stage and calls `callback`; without a bar, `callback` itself.

    There is a bar if `shown` is True, or if it is None and Python runs interactively; never without tqdm.
    """
    tqdm = _tqdm() if (is_interactive() if shown is None else shown) else None
    if tqdm is None:
        yield callback
        return
    bar: Any = None

    def draw(stage: str, done: int, steps: int, denoised: Tensor | None) -> None:
        nonlocal bar
        if title := TITLES.get(stage):
            if bar is None:  # only now, when all arguments have been checked
                bar = tqdm(desc=title, total=steps, unit="step")
            elif done == 1:
                bar.set_description(title, refresh=False)
                bar.reset(total=steps)
            bar.update(done - bar.n)
        if callback is not None:
            callback(stage, done, steps, denoised)

    try:
        yield draw
    finally:
        if bar is not None:
            bar.close()


def _tqdm() -> Any:
    """Returns tqdm's class for this environment, or None if tqdm is not installed or there is no stderr."""
    if sys.stderr is None:  # a program without a console
        return None
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return None
    return tqdm
