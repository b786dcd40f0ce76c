"""Numbers of Python, numpy and torch."""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import numpy as np
import pytest
import torch

from wuerstchen_core.common.numbers import to_float, to_int


class Five(IntEnum):
    FIVE = 5


INTEGERS = [5, np.int8(5), np.uint64(5), np.array(5), torch.tensor(5), torch.tensor(5, dtype=torch.uint8), Five.FIVE]
FLOATS = [2.5, np.float16(2.5), np.float64(2.5), np.array(2.5), torch.tensor(2.5), torch.tensor(2.5).bfloat16()]
NEITHER = [True, np.bool_(True), torch.tensor(True), "5", b"5", None, [5], (5,), np.array([5]), torch.ones(2), 1j, {}]


@pytest.mark.parametrize("value", INTEGERS, ids=repr)
def test_whole_numbers(value: Any) -> None:
    assert type(to_int("x", value)) is int and to_int("x", value) == 5
    assert type(to_float("x", value)) is float and to_float("x", value) == 5


@pytest.mark.parametrize("value", FLOATS, ids=repr)
def test_other_numbers(value: Any) -> None:
    assert type(to_float("x", value)) is float and to_float("x", value) == 2.5
    with pytest.raises(ValueError, match="x 2.5"):
        to_int("x", value)


@pytest.mark.parametrize("value", [*NEITHER, float("nan"), float("inf"), np.float32("nan")], ids=repr)
def test_what_is_no_number(value: Any) -> None:
    for convert in (to_int, to_float):
        with pytest.raises(ValueError, match="^x "):
            convert("x", value)
