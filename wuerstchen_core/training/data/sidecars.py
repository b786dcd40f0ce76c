"""Captions and LAION scores beside an image: a .txt file, a .json file or a line of a metadata.jsonl."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ...common.text import one_line

CAPTION_KEYS = ("caption", "text", "prompt")  # of a JSON table; the first one present counts
SCORE_KEYS = {
    "pwatermark": "watermark", "aesthetic": "aesthetic", "aesthetic_score": "aesthetic", "punsafe": "unsafe"
}  # fmt: skip


def read_caption(text: bytes | None, table: Mapping[str, Any], name: str) -> str:
    """Returns the caption in the bytes of a .txt file, or else in a JSON table, with single spaces.

    ValueError if the image called `name` has none, or one that is not text.
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
    """Returns the JSON table of the image called `name`, empty if it has no .json file (None)."""
    return {} if raw is None else parse_json_table(raw, f"the .json of {name}")


def parse_json_table(raw: bytes, name: str) -> dict[str, Any]:
    """Returns the table in the bytes of a JSON file. ValueError, starting with `name`, if there is none."""
    text = _decode(raw, name)
    try:
        table = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"{name} is not valid JSON") from None
    if not isinstance(table, dict):
        raise ValueError(f"{name} must be a JSON table, got {type(table).__name__}")
    return table


def read_scores(table: Mapping[str, Any], name: str) -> dict[str, float]:
    """Returns the scores in a JSON table: watermark and unsafe probabilities, aesthetic score (1 to 10).

    ValueError for an integer that no float can hold.
    """
    scores = {}
    for key, value in table.items():
        score = SCORE_KEYS.get(key.lower())
        if score and isinstance(value, int | float) and not isinstance(value, bool):
            try:
                scores[score] = float(value)
            except OverflowError:
                raise ValueError(f"the {key} of {name} is too large: correct or remove it") from None
    return scores


def _decode(raw: bytes, name: str) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{name} is not UTF-8: save it as UTF-8") from None
