"""Kills what writes files, runs two at once and fills the disk; see `kills`."""

from __future__ import annotations

import os
import sys

import pytest
from fuzz.kills import OUTCOMES, run_case


@pytest.mark.long
def test_killed_and_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # for the process that the others are forked from
    outcomes = {seed: run_case(seed) for seed in range(200)}
    assert not {seed: text for seed, text in outcomes.items() if text not in OUTCOMES}
