"""Text for messages: single lines, short lists of names, unknown choices."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def one_line(text: object) -> str:
    """Returns `str(text)` with each run of white space replaced by one space."""
    return " ".join(str(text).split())


def listed(names: Sequence[str], most: int = 3, width: int = 40) -> str:
    """Returns the first `most` names, each cut to its last `width` characters, and the number of the others."""
    shown = [name if len(name) <= width else f"…{name[1 - width :]}" for name in names[:most]]
    return ", ".join(shown) + (f" and {len(names) - most} more" if len(names) > most else "")


def check_choice(kind: str, name: str, known: Iterable[str]) -> None:
    """Raises ValueError, listing the known names, unless `name` is one of them."""
    known = list(known)
    if name not in known:
        raise ValueError(f"{kind} {name!r} is unknown: choose {', '.join(known)}")
