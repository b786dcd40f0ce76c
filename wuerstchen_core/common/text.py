"""Text for messages: one line, short lists of names, the nearest known word."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches


def one_line(text: object) -> str:
    """Returns `str(text)` with each run of white space replaced by one space."""
    return " ".join(str(text).split())


def listed(names: Sequence[str], most: int = 3, width: int = 40) -> str:
    """Returns the first `most` names, each cut to its last `width` characters, and how many more there are."""
    shown = [name if len(name) <= width else f"…{name[1 - width :]}" for name in names[:most]]
    return ", ".join(shown) + (f" and {len(names) - most} more" if len(names) > most else "")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Returns `"; did you mean X?"` for the known word nearest to `word`, or "" if none is near."""
    near = get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def check_choice(kind: str, name: str, known: Iterable[str]) -> None:
    """Raises ValueError that lists the known names unless `name` is one of them."""
    known = list(known)
    if name not in known:
        raise ValueError(f"{kind} {name!r} is unknown: choose {', '.join(known)}")
