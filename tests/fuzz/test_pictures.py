"""Damages pictures at random; see `pictures`."""

from __future__ import annotations

import pytest
from fuzz.pictures import run_case
from fuzz.test_weights import wrong


def test_damaged_pictures_are_refused_or_read() -> None:
    assert not wrong(range(500), run_case)


@pytest.mark.long
def test_many_damaged_pictures() -> None:
    assert not wrong(range(20_000), run_case)
