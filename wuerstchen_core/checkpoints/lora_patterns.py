"""PEFT's patterns, regular expressions for module names, in bounded time: Python's `re` can need hours for one."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import count
from typing import TypeAlias

LONGEST_PATTERN = 500  # characters of a pattern

# Returns where matches end in a text, from where they start.
Node: TypeAlias = Callable[[str, set[int]], set[int]]

_CHARACTER = r"(?:\\[dDwWsS]|\\[^\w]|\[\^?\]?(?:\\.|[^\]\\])*\]|[^\\\[\](){}|*+?^$])"
_TOKEN = re.compile(
    rf"(?P<characters>{_CHARACTER}+(?![*+?{{])|{_CHARACTER})"
    r"|(?P<repeat>(?P<mark>[*+?])|\{(?P<least>\d{1,9})(?P<comma>,(?P<most>\d{0,9}))?\})\??"
    r"|(?P<open>\((?:\?:)?)|(?P<other>[)|^$])"
)
_MARKS: dict[str, tuple[int, int | None]] = {"*": (0, None), "+": (1, None), "?": (0, 1)}


def matches(pattern: str, path: str) -> bool:
    """True if a pattern matches the last components of a module's path, as PEFT compares them.

    Supported are characters, classes, groups, alternatives, repetitions, ^ and $. ValueError for other patterns.
    """
    starts = {0} | {i + 1 for i, x in enumerate(path) if x == "."}
    return len(path) in _parse(pattern)(path, starts)


@lru_cache(maxsize=4096)
def _parse(pattern: str) -> Node:
    groups: list[list[list[Node]]] = [[[]]]  # open ones, each with alternatives of nodes in a row
    end = 0
    try:
        for token in _TOKEN.finditer(pattern[:LONGEST_PATTERN]):
            if token.start() != end:
                break
            end = token.end()
            row = groups[-1][-1]
            if token["characters"]:
                row.append(_characters(re.compile(token["characters"])))
            elif token["repeat"]:
                row.append(_repeated(row.pop(), *_limits(token)))
            elif token["open"]:
                groups.append([[]])
            elif token["other"] == "|":
                groups[-1].append([])
            elif token["other"] == ")":
                closed = groups.pop()
                groups[-1][-1].append(_alternatives(closed))
            else:
                row.append(_first if token["other"] == "^" else _last)
        [whole] = groups
        if end == len(pattern):
            return _alternatives(whole)
    except (re.error, LookupError, ValueError):  # a class such as [z-a], or nothing to close or repeat
        pass
    raise ValueError(f"the pattern {pattern!r:.60} is invalid or has an unsupported form")


def _limits(token: re.Match[str]) -> tuple[int, int | None]:
    if token["mark"]:
        return _MARKS[token["mark"]]
    least = int(token["least"])
    return least, least if token["comma"] is None else int(token["most"]) if token["most"] else None


def _first(text: str, at: set[int]) -> set[int]:
    return at & {0}


def _last(text: str, at: set[int]) -> set[int]:
    return at & {len(text)}


def _characters(characters: re.Pattern[str]) -> Node:
    return lambda text, at: {found.end() for i in at if (found := characters.match(text, i))}


def _alternatives(rows: Sequence[Sequence[Node]]) -> Node:
    def match(text: str, at: set[int]) -> set[int]:
        ends: set[int] = set()
        for row in rows:
            reached = at
            for node in row:
                reached = node(text, reached)
                if not reached:
                    break
            ends |= reached
        return ends

    return match


def _repeated(node: Node, least: int, most: int | None) -> Node:
    def match(text: str, at: set[int]) -> set[int]:
        found = set() if least else set(at)
        for number in count(1) if most is None else range(1, most + 1):
            after = node(text, at)
            if after == at:  # so are all that follow
                return found | at
            at = after - found
            found |= at if number >= least else set()
            if not at:
                break
        return found

    return match
