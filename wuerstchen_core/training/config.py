"""A training run as one TOML table a stage; every key has a place, and an unknown one is refused."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PRECISIONS = ("no", "bf16", "fp16")
LARGEST_SEED = 2**32 - 1  # of it the loop makes seeds for each step and process, which must stay below 2**64
COMMON = ("run", "inputs", "data", "cache", "train")  # tables and keys of every stage
INPUTS = ("vqgan", "encoder", "text", "decoder", "token-decoder", "prior")  # stages whose networks others ask


@dataclass(frozen=True)
class LoopConfig:
    """The `[train]` table: how long, how fast, how often."""

    steps: int
    batch: int  # of each process, at a time
    lr: float
    accumulate: int = 1  # batches of each process that a step is made of
    checkpointing: bool = False  # compute blocks again for the gradients instead of keeping what they held
    muon_lr: float = 0.0  # of Muon, which then trains the matrices of the blocks in AdamW's place; 0: AdamW alone
    warmup: int = 100  # steps of linear warmup
    decay: float = 0.3  # share of the steps, at the end, over which the rate falls linearly to zero
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01
    clip: float = 1.0  # largest gradient norm
    ema: float = 0.995
    precision: str = ""  # mixed: no, bf16, fp16; "": as accelerate is configured
    seed: int = 0
    bad_share: float = 0.05  # of steps, without a finite loss, that are left out before it is given up
    keep: int = 2  # checkpoints
    trackers: tuple[str, ...] = ()  # of accelerate: tensorboard, wandb, ...
    log_every: int = 20
    save_every: int = 250
    sheet_every: int = 500

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "lr", "accumulate", "keep", "log_every", "save_every", "sheet_every"):
            if getattr(self, name) <= 0:
                raise ValueError(f"[train] {name} must be more than 0, got {getattr(self, name)}")
        for name, least, most in (
            ("clip", 1e-12, math.inf), ("ema", 0, 1), ("decay", 0, 1), ("warmup", 0, math.inf),
            ("muon_lr", 0, math.inf), ("weight_decay", 0, math.inf), ("seed", 0, LARGEST_SEED),
        ):  # fmt: skip
            if not least <= getattr(self, name) <= most:
                raise ValueError(f"[train] {name} must be from {least} to {most}, got {getattr(self, name)}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"[train] betas must be at least 0 and less than 1, got {list(self.betas)}")
        if self.precision not in ("", *PRECISIONS):
            raise ValueError(f"[train] precision {self.precision!r} is unknown: choose {', '.join(PRECISIONS)}")
        if not 0 <= self.bad_share <= 1:
            raise ValueError(f"[train] bad_share is a share from 0 to 1, got {self.bad_share}")


def check_tables(config: Mapping[str, Any], own: tuple[str, ...]) -> None:
    """Raises ValueError for an unknown or malformed table, a missing run folder and a missing network.

    `own` are the tables that only this stage reads; with "model" among them, one of `model` and `start` is required.
    """
    known = (*COMMON, *own)
    unknown = sorted(set(config) - set(known))
    if unknown:
        raise ValueError(f"the configuration has no place for {', '.join(unknown)}: it takes {', '.join(known)}")
    for name, table in config.items():
        if name not in ("run", "start", "inputs") and not isinstance(table, Mapping):
            raise ValueError(f"{name} is a table of keys, not {table!r}")
    if not isinstance(config.get("start", ""), str):
        raise ValueError(f"start is a text, the name of weights to go on from, not {config['start']!r}")
    inputs = config.get("inputs", {})
    if not isinstance(inputs, Mapping) or not all(isinstance(name, str) for name in inputs.values()):
        raise ValueError("[inputs] is a table of texts: what a stage asks, and the name of its weights")
    if other := sorted(set(inputs) - set(INPUTS)):
        raise ValueError(f"[inputs] has no key {', '.join(other)}: it takes {', '.join(INPUTS)}")
    if not isinstance(config.get("run"), str):
        raise ValueError('the configuration names no run folder: add run = "runs/mine" at its top')
    if "model" in own and "model" not in config and "start" not in config:
        raise ValueError(
            "the configuration has no [model] table: add one with the sizes of the network, or name weights to start "
            'from at its top, such as start = "demo"'
        )


def read_config(path: Path, overrides: list[str]) -> dict[str, Any]:
    """A TOML file with `table.key=value` overrides (values in TOML; a bare word is a string)."""
    try:
        config = tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no TOML file: {error}") from error
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
            if not isinstance(table, dict):
                raise ValueError(f"--set {override!r} names a key inside {part}, which is no table")
        table[name] = value
    return config
