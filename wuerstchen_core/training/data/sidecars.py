"""What stands beside a picture: its caption as text or in JSON, and the scores that LAION gave it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

CAPTIONS = ("caption", "text", "prompt")  # keys of a JSON table, in this order
SCORES = {"pwatermark": "watermark", "aesthetic": "aesthetic", "aesthetic_score": "aesthetic", "punsafe": "unsafe"}


def caption_from_text(raw: bytes, name: str) -> str:
    """The caption in the bytes of a .txt file, its white space made single spaces; ValueError if there is none."""
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"the caption of {name} is not UTF-8: save it as UTF-8") from None
    return _normal(text, name)


def caption_from_table(table: Mapping[str, Any], name: str) -> str:
    """The caption in a JSON table; ValueError if there is none."""
    values = {key.lower(): value for key, value in table.items()}
    for value in (values[key] for key in CAPTIONS if values.get(key) is not None):
        if not isinstance(value, str):
            raise ValueError(f"the caption of {name} is no text but {type(value).__name__}")
        return _normal(value, name)
    raise no_caption(name)


def no_caption(name: str) -> ValueError:
    """What to say of a picture without a caption."""
    return ValueError(
        f"{name} has no caption: add a .txt or .json file of the same name, or name it in a metadata.jsonl"
    )


def table_from_json(raw: bytes, name: str) -> dict[str, Any]:
    """The table in the bytes of JSON; ValueError if there is none."""
    try:
        table = json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise ValueError(f"{name} is not UTF-8: save it as UTF-8") from None
    except (ValueError, RecursionError):
        raise ValueError(f"{name} is no JSON") from None
    if not isinstance(table, dict):
        raise ValueError(f"{name} holds no JSON table but {type(table).__name__}")
    return table


def scores_from_table(table: Mapping[str, Any], name: str) -> dict[str, float]:
    """The scores in a JSON table: chance of a watermark, aesthetic score (1 to 10), chance to be unsafe; ValueError if
    one is a whole number of more than 308 digits."""
    found = {}
    for key, value in table.items():
        score = SCORES.get(key.lower())
        if score and isinstance(value, int | float) and not isinstance(value, bool):
            try:
                found[score] = float(value)
            except OverflowError:
                raise ValueError(f"the {key} of {name} is too large for a score: correct it, or leave it out") from None
    return found


def _normal(text: str, name: str) -> str:
    if not (words := text.split()):
        raise no_caption(name)
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON may hold it, UTF-8 may not
        raise ValueError(f"the caption of {name} holds half of a surrogate pair, which is no text: mend it") from None
    return " ".join(words)
