"""A training run as one TOML table a stage; every key has a place, and an unknown one is refused."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T = TypeVar("T")


@dataclass(frozen=True)
class LoopConfig:
    """The `[train]` table: how long, how fast, how often."""

    steps: int
    batch: int
    lr: float
    warmup: int = 100  # steps of linear warmup
    decay: float = 0.3  # share of the steps, at the end, over which the rate falls linearly to zero
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01
    clip: float = 1.0  # largest gradient norm
    ema: float = 0.995
    precision: str = "no"  # accelerate's mixed precision: no, bf16, fp16
    seed: int = 0
    log_every: int = 20
    save_every: int = 250
    sheet_every: int = 500


def from_table(kind: type[T], table: Mapping[str, Any], where: str) -> T:
    """A dataclass from a TOML table (lists become tuples); ValueError names unknown and missing keys."""
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(set(table) - set(fields))
    if unknown:
        raise ValueError(f"[{where}] has no key {', '.join(unknown)}: it takes {', '.join(fields)}")
    missing = [
        name
        for name, field in fields.items()
        if name not in table and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"[{where}] lacks {', '.join(missing)}: add it to the configuration")
    return kind(**{key: as_tuple(value) for key, value in table.items()})


def as_tuple(value: Any) -> Any:
    """Lists to tuples, at every depth."""
    return tuple(as_tuple(item) for item in value) if isinstance(value, list) else value


def read_config(path: Path, overrides: list[str]) -> dict[str, Any]:
    """A TOML file with `table.key=value` overrides (values in TOML; a bare word is a string)."""
    with path.open("rb") as file:
        config = tomllib.load(file)
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator:
            raise ValueError(f"--set {override!r} is not of the form table.key=value")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text
        *tables, name = key.split(".")
        table = config
        for part in tables:
            table = table.setdefault(part, {})
        table[name] = value
    return config
