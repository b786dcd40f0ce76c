"""Files of prompts: each line is a JSON object for one or more images, checked before anything is generated."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.dataclass_config import from_table
from ..training.data.sidecars import parse_json_table
from .options import SAMPLING, SIZE
from .save import image_metadata

if TYPE_CHECKING:
    from ..inference.settings import SamplingSettings


@dataclass(frozen=True)
class PromptLine:
    """The keys of a line. Those that are absent come from the command's options, or else from the model's metadata."""

    prompt: str
    negative: str = ""
    seed: int | None = None
    count: int = 1
    width: int | None = None
    height: int | None = None
    schedule: str | None = None
    sampler: str | None = None
    prior_steps: int | None = None
    prior_guidance: float | None = None
    decoder_steps: int | None = None
    decoder_guidance: float | None = None
    decoder_guidance_end: float | None = None
    temperature: tuple[float, float] | None = None
    token_mode: str | None = None


KEYS = tuple(field.name for field in fields(PromptLine))
SETTINGS = (*SIZE, *SAMPLING)
MAX_COUNT = 100_000  # images of a line; a larger number is a mistake


@dataclass(frozen=True)
class ImageRequest:
    """One image to generate; `name` is its file name without suffix."""

    name: str
    prompt: str
    negative: str
    seed: int
    settings: SamplingSettings

    def metadata(self, models: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the metadata that the image's file will hold, as JSON reads it (tuples are lists)."""
        request = {"prompt": self.prompt, "negative": self.negative}
        table = image_metadata(request, self.seed, models, self.settings.as_dict())
        return dict(json.loads(json.dumps(table)))


def read_lines(path: Path) -> dict[int, bytes]:
    """Returns the lines of a file that are not blank, by number. ValueError if there is none."""
    with path.open("rb") as file:
        lines = {number: raw for number, raw in enumerate(file, 1) if raw.strip()}
    if not lines:
        raise ValueError(f'{path} has no prompts: write one JSON object per line, such as {{"prompt": "a red apple"}}')
    return lines


def parse_line(
    number: int, raw: bytes, defaults: dict[str, Any], settings: SamplingSettings, seed: int
) -> list[ImageRequest]:
    """Returns the images of a line; `defaults` and the model's `settings` complete it. ValueError if it is invalid.

    Without a seed of its own, a line's seed depends only on `seed` and its number.
    """
    from ..inference.settings import check_count

    line = from_table(PromptLine, {**defaults, **parse_json_table(raw, "it")}, "line")
    line.prompt.encode(), line.negative.encode()  # JSON can hold half of a surrogate pair, UTF-8 cannot
    first = line_seed(seed, number) if line.seed is None else line.seed
    check_count(line.count, first)
    if line.count > MAX_COUNT:
        raise ValueError(f"count {line.count} is too large: give at most {MAX_COUNT}, or several lines")
    settings = settings.updated(**{name: getattr(line, name) for name in SETTINGS})
    # The first image's name does not depend on `count`, which may grow later.
    names = [f"{number:06d}{f'-{i}' if i > 1 else ''}" for i in range(1, line.count + 1)]
    return [ImageRequest(name, line.prompt, line.negative, first + i, settings) for i, name in enumerate(names)]


def line_seed(seed: int, number: int) -> int:
    """Returns the seed of a line that has none: 48 bits of a hash, so that lines with a `count` do not overlap."""
    return int.from_bytes(hashlib.sha256(f"{seed} {number}".encode()).digest()[:6], "big")
