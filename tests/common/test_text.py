"""Text for messages."""

from __future__ import annotations

from wuerstchen_core.common.text import did_you_mean, listed, one_line


def test_one_line() -> None:
    assert one_line(ValueError("a\n  b\tc ")) == "a b c"


def test_long_lists_and_names_are_cut() -> None:
    assert listed(["a", "b"]) == "a, b"
    assert listed(["a", "b", "c", "d", "e"]) == "a, b, c and 2 more"
    assert listed(["x" * 50 + "end"], width=10) == "…" + "x" * 6 + "end"


def test_the_nearest_word_is_suggested() -> None:
    assert did_you_mean("aple", ["apple", "cat"]) == "; did you mean apple?"
    assert did_you_mean("zzz", ["apple", "cat"]) == ""
