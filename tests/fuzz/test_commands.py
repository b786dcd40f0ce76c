"""Runs random command lines; see `commands`."""

from __future__ import annotations

import pytest
from fuzz.commands import run_case
from fuzz.test_weights import wrong


@pytest.mark.filterwarnings("ignore")
def test_random_command_lines_succeed_or_say_why_not() -> None:
    assert not wrong(range(7, 37), run_case)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
def test_many_random_command_lines() -> None:
    assert not wrong(range(1000, 2000), run_case)
