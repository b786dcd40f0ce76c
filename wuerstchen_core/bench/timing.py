"""Time: both sides in turn, in one process, so that what disturbs the machine disturbs both."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from .cases import Case

Clock = Callable[[], float]  # seconds


class Side(Protocol):
    """What is timed."""

    def run(self, case: Case, rounds: int, after: Callable[[], None]) -> None: ...


class Other(Protocol):
    """What is timed between the rounds of a side."""

    def rounds(self, case: Case, rounds: int) -> Iterator[None]: ...


@dataclass
class Times:
    """Seconds of each round; of a sampler's steps, and of the first call at a size, the first has more to do."""

    first: float | None = None
    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half of the way from the quickest round to the slowest, as a share of the median."""
        return (max(self.seconds) - min(self.seconds)) / 2 / self.median

    def add(self, seconds: float) -> None:
        if self.first is None:
            self.first = seconds
        else:
            self.seconds.append(seconds)


def clock_of(device: Any) -> Clock:
    """The time at which a device has done all that it was told to do."""
    kind = torch.device(device).type
    wait = getattr(getattr(torch, kind, None), "synchronize", None) if kind != "cpu" else None

    def now() -> float:
        if wait is not None:
            wait()
        return time.perf_counter()

    return now


def interleave(ours: Side, peer: Other | None, case: Case, repeat: int, clock: Clock) -> tuple[Times, Times | None]:
    """One round that is told apart and `repeat` that count, of each side in turn."""
    times = Times(), Times()
    between = None if peer is None else peer.rounds(case, repeat + 1)
    started = clock()

    def after() -> None:
        nonlocal started
        now = clock()
        times[0].add(now - started)
        if between is not None:
            started = clock()
            next(between)
            now = clock()
            times[1].add(now - started)
        started = clock()

    ours.run(case, repeat + 1, after)
    return times[0], None if peer is None else times[1]
