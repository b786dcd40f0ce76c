"""Damages weight files at random; see `weights`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from fuzz.weights import run_case

FIRST = 100_000  # number of the first case; `python -m fuzz.weights --cases 1 --seed NUMBER` runs one alone


def wrong(cases: range, run: Callable[[int], str] = run_case) -> dict[int, str]:
    """Runs cases and returns those that are wrong."""
    outcomes = {seed: run(seed) for seed in cases}
    assert {"accepted", "refused"} <= set(outcomes.values())
    return {seed: text for seed, text in outcomes.items() if text not in ("accepted", "refused", "skipped")}


def test_damaged_files_are_refused_or_read_right() -> None:
    assert not wrong(range(FIRST, FIRST + 25))


@pytest.mark.long
@pytest.mark.parametrize("part", range(5))
def test_many_damaged_files(part: int) -> None:
    assert not wrong(range(part * 1000, part * 1000 + 1000))
