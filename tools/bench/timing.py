"""Time: both sides in turn, in one process, so that what disturbs the machine disturbs both."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from .cases import STAGES, Case
from .setting import Clock


class Side(Protocol):
    """What is timed."""

    left_out: float  # seconds that the last round would have taken for steps that it left out

    def run(self, case: Case, rounds: int, after: Callable[[], None]) -> None: ...


class Other(Protocol):
    """What is timed between the rounds of a side."""

    left_out: float

    def rounds(self, case: Case, rounds: int) -> Iterator[None]: ...


@dataclass
class Times:
    """Seconds of each round; the first of a sampler's steps has more to do and is told apart."""

    first: float | None = None
    seconds: list[float] = field(default_factory=list)
    first_apart: bool = False

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float | None:
        """Half of the way from the quickest round to the slowest, as a share of the median; None of a single round."""
        if len(self.seconds) < 2:
            return None
        return (max(self.seconds) - min(self.seconds)) / 2 / self.median

    def add(self, seconds: float) -> None:
        if self.first_apart and self.first is None:
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
    """`repeat` rounds that count, of each side in turn."""
    steps = STAGES[case.stage].steps
    times = Times(first_apart=steps), Times(first_apart=steps)
    between = None if peer is None else peer.rounds(case, repeat + steps)
    started = clock()

    def after() -> None:
        nonlocal started
        now = clock()
        times[0].add(now - started + ours.left_out)
        if peer is not None and between is not None:
            started = clock()
            next(between)
            now = clock()
            times[1].add(now - started + peer.left_out)
        started = clock()

    ours.run(case, repeat + steps, after)
    return times[0], None if peer is None else times[1]
