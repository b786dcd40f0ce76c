"""Reads the texts beside an image: its caption, and JSON tables with captions and LAION scores."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ...common.text import one_line

CAPTION_KEYS = ("caption", "text", "prompt")  # in a JSON table; the first one present counts


def read_caption(text: bytes | None, table: Mapping[str, Any], name: str) -> str:
    """Returns the caption from the bytes of a .txt file or, if there is none, from a JSON table, with single spaces.

    ValueError if the image called `name` has no caption, or one that is not text.
    """
    if text is None:
        values = {key.lower(): value for key, value in table.items() if value is not None}
        caption = next((values[key] for key in CAPTION_KEYS if key in values), "")
        if not isinstance(caption, str):
            raise ValueError(f"the caption of {name} must be text, got {type(caption).__name__}")
    else:
        caption = _decode(text, f"the caption of {name}")
    if not (caption := one_line(caption)):
        raise ValueError(f"{name} has no caption: add a .txt or .json file of the same name, or a metadata.jsonl line")
    try:
        caption.encode()
    except UnicodeEncodeError:  # JSON can express it, UTF-8 cannot
        raise ValueError(f"the caption of {name} contains half of a surrogate pair: correct it") from None
    return caption


def read_table(raw: bytes | None, name: str) -> dict[str, Any]:
    """Returns the JSON table of the image called `name`, empty if it has no .json file (`raw` is None)."""
    return {} if raw is None else parse_json_table(raw, f"the .json of {name}")


def parse_json_table(raw: bytes, name: str) -> dict[str, Any]:
    """Returns the table in the bytes of a JSON file. ValueError, starting with `name`, if they are not a JSON table."""
    text = _decode(raw, name)
    try:
        table = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"{name} is not valid JSON: correct it") from None
    if not isinstance(table, dict):
        raise ValueError(f"{name} must be a JSON table, got {type(table).__name__}")
    return table


def _decode(raw: bytes, name: str) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{name} is not UTF-8: save it as UTF-8") from None
