"""Numbers of Python, numpy and torch as plain ints and floats, and tensors of finite numbers."""

from __future__ import annotations

import math
import operator
from typing import Any


def check_finite(network: str, x: Any) -> Any:
    """Returns a tensor that a network computed. Raises ValueError, with its name, if a number in it is not finite."""
    if not x.isfinite().all():
        raise ValueError(
            f"{network} computed numbers that are not finite, which would be black pixels: its weights may be damaged, "
            "a LoRA's strength or the guidance too high, or the range of fp16 too small (use bf16)"
        )
    return x


def plain(value: Any) -> Any:
    """Returns a numpy or torch scalar as a Python number, an array or tensor as a list, and anything else unchanged."""
    return value.tolist() if hasattr(value, "tolist") else value


def to_int(name: str, value: Any) -> int:
    """Returns a whole number as an int. Raises ValueError, with the `name`, for anything else (bool, text, 2.0)."""
    number = plain(value)
    if isinstance(number, bool) or not hasattr(type(number), "__index__"):
        raise ValueError(f"{name} {number!r:.60} cannot be used: give a whole number")
    return operator.index(number)


def to_float(name: str, value: Any) -> float:
    """Returns a finite number as a float. Raises ValueError, with the `name`, for anything else (bool, text, NaN)."""
    number = plain(value)
    try:
        if isinstance(number, bool | str | bytes) or not math.isfinite(number):
            raise TypeError
        return float(number)
    except (TypeError, OverflowError):
        raise ValueError(f"{name} {number!r:.60} cannot be used: give a number") from None
