"""Reads the texts beside an image: its captions, and JSON tables with captions and LAION scores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...common.text import decode_text, one_line, parse_json

CAPTION_KEYS = ("caption", "text", "prompt", "captions")  # in a JSON table; the first one present counts
TEXT_SUFFIXES = (".txt", ".caption")  # the first one present counts


class MissingCaption(ValueError):
    """An image has no caption."""


def read_captions(text: bytes | None, table: Mapping[str, Any], name: str) -> list[str]:
    """Returns the different captions of an image, with single spaces: at least one.

    They are the lines of its .txt file (`text`) or, if there is none, a text or a list of texts in a JSON table.
    MissingCaption if the image called `name` has none, ValueError if it has one that is not text.
    """
    if text is None:
        values = {key.lower(): value for key, value in table.items() if _is_filled(value)}
        found: Any = next((values[key] for key in CAPTION_KEYS if key in values), [])
        texts = found if isinstance(found, list) else [found]
        if wrong := next((one for one in texts if not isinstance(one, str)), None):
            raise ValueError(f"the caption of {name} must be text, got {type(wrong).__name__}")
    else:
        texts = decode_text(text, f"the caption of {name}").splitlines()
    captions = list(dict.fromkeys(filter(None, map(one_line, texts))))
    if not captions:
        raise MissingCaption(
            f"{name} has no caption: add a .txt, .caption or .json file of the same name, or a metadata.jsonl line"
        )
    try:
        "".join(captions).encode()
    except UnicodeEncodeError:  # JSON can express it, UTF-8 cannot
        raise ValueError(f"the caption of {name} contains half of a surrogate pair: correct it") from None
    return captions


def has_caption(table: Mapping[str, Any]) -> bool:
    """True if a JSON table has a value that is read as its captions."""
    return any(key.lower() in CAPTION_KEYS and _is_filled(value) for key, value in table.items())


def _is_filled(value: Any) -> bool:
    """False for what stands for a missing caption: null, an empty text, an empty list."""
    return value is not None and value != [] and not (isinstance(value, str) and not value.strip())


def caption_names(name: str, count: int) -> list[str]:
    """Returns the names of an image's examples, one for each of its captions."""
    return [name if line == 0 else f"{name} (caption {line + 1})" for line in range(count)]


def read_table(raw: bytes | None, name: str) -> dict[str, Any]:
    """Returns the JSON table of the image called `name`, empty if it has no .json file (`raw` is None).

    A text or a list alone is the caption.
    """
    if raw is None:
        return {}
    table = _parse(raw, where := f"the .json of {name}")
    return {"caption": table} if isinstance(table, str | list) else _check_table(table, where)


def parse_json_table(raw: bytes, name: str) -> dict[str, Any]:
    """Returns the table in the bytes of a JSON file. ValueError, starting with `name`, if they are not a JSON table."""
    return _check_table(_parse(raw, name), name)


def _parse(raw: bytes, name: str) -> Any:
    text = decode_text(raw, name)
    try:
        return parse_json(text)
    except ValueError:
        raise ValueError(f"{name} is not valid JSON: correct it") from None


def _check_table(table: Any, name: str) -> dict[str, Any]:
    if not isinstance(table, dict):
        raise ValueError(f"{name} must be a JSON table, got {type(table).__name__}")
    return table
