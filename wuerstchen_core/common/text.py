"""Text of files, and for messages: single lines, short lists of names, unknown choices."""

from __future__ import annotations

import codecs
import difflib
import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from itertools import chain
from typing import Any

DEPTH = 64  # of lists and tables in one another, far beyond that of files in use
LONGEST = 1000  # characters of an error message
_SPACES_AND_JOINERS = "\u200c\u200d\xa0\u3000"  # which scripts need, though Python does not count them as printable
MARKS = {  # UTF-32 first: its mark begins with that of UTF-16
    (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE): "utf-32",
    (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE): "utf-16",
}


def one_line(text: object) -> str:
    """Returns `str(text)` with each run of white space replaced by one space."""
    return " ".join(str(text).split())


def printable(text: str) -> str:
    """Returns a text with escapes for characters that cannot be printed, such as those that control a terminal."""
    return "".join(map(_escaped, text))


def _escaped(x: str) -> str:
    is_printable = x.isprintable() or x in _SPACES_AND_JOINERS
    return x if is_printable else x.encode("unicode_escape", "surrogatepass").decode()


def check_name(path: object) -> None:
    """Raises ValueError if the name of a file or folder is not UTF-8, for formats and libraries that need it."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise ValueError(f"the name {printable(str(path))} is not UTF-8: rename it, or choose another") from None


def error_text(error: BaseException) -> str:
    """Returns the message of an error as one printable line, of which the middle is left out if it is very long."""
    text = printable(one_line(error)) or type(error).__name__
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} … {text[3 - LONGEST // 2 :]}"


def listed(names: Sequence[str], most: int = 3, width: int = 40) -> str:
    """Returns the first `most` names, each cut to its last `width` characters, and the number of the others.

    Control characters are escaped.
    """
    shown = [printable(name if len(name) <= width else f"…{name[1 - width :]}") for name in names[:most]]
    return ", ".join(shown) + (f" and {len(names) - most} more" if len(names) > most else "")


def decode_text(raw: bytes, name: str) -> str:
    """Returns the text of a file in UTF-8, or in UTF-16 or UTF-32 with a byte order mark, without the mark.

    ValueError, starting with `name`, for other encodings.
    """
    marked = next((encoding for marks, encoding in MARKS.items() if raw.startswith(marks)), None)
    if b"\0" in raw and not marked:
        raise ValueError(f"{name} is UTF-16 without a byte order mark, or no text, not UTF-8: save it as UTF-8")
    try:
        return raw.decode(marked or "utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{name} is not UTF-8: save it as UTF-8") from None


def parse_json(text: str | bytes) -> Any:
    """Returns the value of a JSON text. ValueError if it is damaged or too deeply nested."""
    return parse_bounded(json.loads, text)


def parse_bounded(parse: Callable[[Any], Any], text: str | bytes) -> Any:
    """Returns `parse(text)`. ValueError if lists or tables in the value are nested more than `DEPTH` deep."""
    with suppress(RecursionError):
        level = [value := parse(text)]
        for _ in range(DEPTH + 1):
            lists = [x.values() if isinstance(x, dict) else x for x in level if isinstance(x, list | dict)]
            if not lists:
                return value
            level = list(chain.from_iterable(lists))
    raise ValueError("it is nested too deeply")


def nearest(name: object, known: Iterable[str]) -> str:
    """Returns a note for messages that names the known name most like an unknown one; "" if none is like it."""
    found = difflib.get_close_matches(str(name), known, n=1)
    return f" (did you mean {found[0]}?)" if found else ""


def check_choice(kind: str, name: str, known: Iterable[str]) -> None:
    """Raises ValueError, listing the known names, unless `name` is one of them."""
    known = list(known)
    if name not in known:
        raise ValueError(f"{kind} {name!r} is unknown{nearest(name, known)}: choose {', '.join(known)}")
