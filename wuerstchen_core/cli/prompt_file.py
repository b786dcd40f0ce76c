"""The pictures that a file of prompts asks for: a JSON table a line, checked before anything is painted."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.dataclass_config import from_table
from ..training.data.sidecars import table_from_json
from .options import DECODER, PRIOR, SIZE

if TYPE_CHECKING:
    from ..inference.settings import SamplingSettings


@dataclass(frozen=True)
class Line:
    """What a line can say; what it leaves out is as the command's options say, or else the model's metadata."""

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


NUMBERS = (*SIZE, *PRIOR, *DECODER)
MOST = 100_000  # pictures of a line: above, it is a slip
KEYS = tuple(field.name for field in fields(Line))


@dataclass(frozen=True)
class Wanted:
    """One picture."""

    name: str  # of its files, without an ending
    prompt: str
    negative: str
    seed: int
    sampling: SamplingSettings

    def made(self, models: Mapping[str, Any]) -> dict[str, Any]:
        """How it is made, as JSON that `models` begins: what `generate` writes into a picture."""
        told = {name: value for name, value in self.sampling.numbers().items() if value is not None}
        made = {"prompt": self.prompt, "negative": self.negative, "seed": self.seed, **models, **told}
        table: dict[str, Any] = json.loads(json.dumps(made))  # whose tuples are lists
        return table


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file that are not empty, numbered from 1; ValueError if there is none."""
    empty = True
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            if raw.strip():
                empty = False
                yield number, raw
    if empty:
        raise ValueError(f'{path} holds no prompt: write a line for each, such as {{"prompt": "a red apple"}}')


def wanted(number: int, raw: bytes, defaults: Mapping[str, Any], sampling: SamplingSettings, seed: int) -> list[Wanted]:
    """The pictures of a line: `defaults` are what it leaves out, `sampling` the model's. ValueError says what is wrong.

    Seeds are the line's own, or else follow from `seed` and the line's number alone, whatever else there is to paint.
    """
    from ..inference.settings import check_count

    table = table_from_json(raw, "it")
    line = from_table(Line, {**defaults, **table}, "line")
    line.prompt.encode(), line.negative.encode()  # half of a surrogate pair is JSON, but no text
    first = seed_of(seed, number) if line.seed is None else line.seed
    check_count(line.count, first)
    if line.count > MOST:
        raise ValueError(f"a count of {line.count} cannot be used: give at most {MOST}, or several lines")
    told = sampling.changed(**{name: getattr(line, name) for name in NUMBERS})
    # The first one's name stays if `count` rises later.
    names = [f"{number:06d}{f'-{i}' if i > 1 else ''}" for i in range(1, line.count + 1)]
    return [Wanted(name, line.prompt, line.negative, first + i, told) for i, name in enumerate(names)]


def seed_of(seed: int, number: int) -> int:
    """The seed of a line that has none: 48 bits, so that neighbours with a `count` do not meet."""
    return int.from_bytes(hashlib.sha256(f"{seed} {number}".encode()).digest()[:6], "big")
