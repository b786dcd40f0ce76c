"""PEFT's patterns for module names."""

from __future__ import annotations

import re

import pytest

from wuerstchen_core.checkpoints.lora_patterns import LONGEST_PATTERN, matches

PATHS = (
    "to_q",
    "blocks.2.attention.to_q",
    "blocks.12.attention.to_out.0",
    "attention.to_q.x",
    "",
    "x.to_k",
    "to_q.to_q",
)
PATTERNS = (
    "to_q", "o_q", "attention.to_q", r"attention\.to_[qk]", "^to_q", "^blocks.2.attention.to_q$", r"blocks\.\d+\..*",
    ".*", ".+q", "to_(q|k)", "(?:to_q|x)(?:.to_k)?", r"blocks\.\d{2}.+0", r"\w{3,4}", "[^.]+", "(to_q.?){2,}", "x?", "",
    r"b\w*s.\d{1,}?.attention.to_.*?", "a|to_q|^b.*0", "[]x]", "to_q$|to_k", r"[\w.]{7,23}",
)  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_match_as_in_python(pattern: str) -> None:
    for path in PATHS:
        assert matches(pattern, path) == bool(re.match(rf"(.*\.)?({pattern})$", path)), path


@pytest.mark.parametrize(
    "pattern", ["(", ")", "*", "[z-a]", "[", "a{1", "{2}", r"(a)\1", "(?=a)", "\\", "a" * (LONGEST_PATTERN + 1)]
)
def test_other_patterns_are_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match="pattern"):
        matches(pattern, "to_q")
