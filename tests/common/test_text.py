"""Text for messages."""

from __future__ import annotations

import pytest

from wuerstchen_core.common.text import (
    DEPTH,
    LONGEST,
    check_choice,
    error_text,
    listed,
    one_line,
    parse_json,
    printable,
)


def test_one_line() -> None:
    assert one_line(ValueError("a\n  b\tc ")) == "a b c"


def test_long_lists_and_names_are_cut() -> None:
    assert listed(["a", "b"]) == "a, b"
    assert listed(["a", "b", "c", "d", "e"]) == "a, b, c and 2 more"
    assert listed(["x" * 50 + "end"], width=10) == "…" + "x" * 6 + "end"


def test_an_unknown_choice_is_refused_with_the_known_ones() -> None:
    check_choice("colour", "red", ["red", "blue"])
    with pytest.raises(ValueError, match="'green'.*red, blue"):
        check_choice("colour", "green", ["red", "blue"])


def test_control_characters_are_escaped() -> None:
    assert printable("é\x1b[31m\n\u202e") == "é\\x1b[31m\\n\\u202e"
    assert listed(["\x1b[2J"]) == "\\x1b[2J"


def test_joiners_and_wide_spaces_are_no_control_characters() -> None:
    text = "\u0645\u06cc\u200c\u062e \u5199\u30001"
    assert printable(f"{text}\x07") == f"{text}\\x07"


def test_errors_are_one_short_line() -> None:
    assert error_text(ValueError("x\x1b[2J\nis  wrong")) == "x\\x1b[2J is wrong"
    assert error_text(KeyError()) == "KeyError"
    text = error_text(ValueError("file" + "x" * 10_000 + "do this"))
    assert len(text) == LONGEST and text.startswith("filex") and text.endswith("xdo this")


def test_json_is_nested_only_so_deep() -> None:
    assert parse_json('{"a": [1, {"b": 2}]}') == {"a": [1, {"b": 2}]}
    for start, middle, end in (("[", "", "]"), ('{"a":', "{}", "}")):
        depth = DEPTH - len(middle) // 2
        parse_json(start * depth + middle + end * depth)
        for more in (1, 600, 100_000):
            with pytest.raises(ValueError, match="deep"):
                parse_json(start * (depth + more) + middle + end * (depth + more))
