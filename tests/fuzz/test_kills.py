"""Kills what writes files, and runs it twice at once; see `kills`."""

from __future__ import annotations

import pytest
from fuzz.kills import run_case


@pytest.mark.long
def test_killed_and_started_again() -> None:
    outcomes = {seed: run_case(seed) for seed in range(100)}
    assert not {seed: text for seed, text in outcomes.items() if text != "accepted"}
