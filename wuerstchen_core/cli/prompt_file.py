"""Files of prompts: each line is a prompt, or a JSON object for one or more images.

All lines are checked before anything is generated.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, make_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from ..common.dataclass_config import from_table
from ..common.files import read_text_file
from ..common.text import decode_text
from ..inference.settings import SamplingOptions, SamplingSettings, check_count
from ..training.data.sidecars import parse_json_table

SETTINGS = {"width": int | None, "height": int | None, **get_type_hints(SamplingOptions)}
OWN_KEYS: list[Any] = [("prompt", str), ("negative", str, ""), ("seed", int | None, None), ("count", int, 1)]
# The keys of a line with their types and defaults: its own, and the settings of its images.
PromptLine: Any = make_dataclass("PromptLine", [*OWN_KEYS, *((name, kind, None) for name, kind in SETTINGS.items())])
PLAIN = ("", ".txt", ".text")  # suffixes of files whose lines may be plain prompts
JSON_OBJECT = re.compile(rb'\s*\{\s*"')
MAX_COUNT = 100_000  # images of a line; a larger number is a mistake


@dataclass(frozen=True)
class ImageRequest:
    """One image to generate; `name` is its file name without a suffix."""

    name: str
    prompt: str
    negative: str
    seed: int
    settings: SamplingSettings

    def metadata(self, models: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the metadata of the image's file, as it is read back from JSON (tuples become lists)."""
        request = {"prompt": self.prompt, "negative": self.negative, "seed": self.seed}
        return dict(json.loads(json.dumps({**request, **models, **self.settings.as_dict()})))


def read_lines(path: Path) -> dict[int, bytes]:
    """Returns the lines of a file that are not blank as JSON objects, by line number. ValueError if there is none.

    A .txt file may have plain prompts, and lines of comments that start with "#". Reads UTF-8, and UTF-16 or UTF-32
    with a mark; raises ValueError for these without one.
    """
    if path.is_dir() or not path.exists():
        raise ValueError(f"{path} is not a file: give a file of prompts")
    data = read_text_file(path)
    if b"\0" in data:
        data = decode_text(data, str(path)).encode()
    lines = enumerate(data.removeprefix(codecs.BOM_UTF8).splitlines(), 1)
    found = {number: raw.strip() for number, raw in lines if raw.strip()}
    if path.suffix.lower() in PLAIN:
        found = {number: _as_json(raw) for number, raw in found.items() if not raw.startswith(b"#")}
    if not found:
        raise ValueError(
            f'{path} has no prompts: write one per line of a .txt file, or objects like {{"prompt": "a red apple"}}'
        )
    return found


def _as_json(line: bytes) -> bytes:
    """Returns a plain prompt as a JSON object; JSON objects, and what is not UTF-8, as they are."""
    if JSON_OBJECT.match(line):
        return line
    try:
        return json.dumps({"prompt": line.decode()}).encode()
    except UnicodeDecodeError:  # `parse_line` reports it
        return line


def parse_line(
    number: int, raw: bytes, defaults: dict[str, Any], settings: SamplingSettings, seed: int
) -> list[ImageRequest]:
    """Returns the images of a line. ValueError if it is invalid.

    Keys that the line lacks come from `defaults`, the command's options, and then from the model's `settings`. A
    missing seed is derived from `seed` and the line number alone.
    """
    line = from_table(PromptLine, {**defaults, **parse_json_table(raw, "it")}, "line")
    try:
        f"{line.prompt}{line.negative}".encode()
    except UnicodeEncodeError:  # JSON can express it, UTF-8 cannot
        raise ValueError("its text contains half of a surrogate pair: correct it") from None
    first = line_seed(seed, number) if line.seed is None else line.seed
    check_count(line.count, first)
    if line.count > MAX_COUNT:
        raise ValueError(f"count {line.count} is too large: give at most {MAX_COUNT}, or several lines")
    settings = settings.updated(**{name: getattr(line, name) for name in SETTINGS})
    # The first image's name does not depend on `count`, which may grow later.
    names = [f"{number:06d}{f'-{i}' if i > 1 else ''}" for i in range(1, line.count + 1)]
    return [ImageRequest(name, line.prompt, line.negative, first + i, settings) for i, name in enumerate(names)]


def line_seed(seed: int, number: int) -> int:
    """Returns the seed of a line without one: 48 bits of a hash, so that the seeds of `count` images do not overlap."""
    return int.from_bytes(hashlib.sha256(f"{seed} {number}".encode()).digest()[:6], "big")
