"""The record of a run in its folder: its configuration and its starts. A run resumes only with what it started with."""

from __future__ import annotations

import json
import logging
import os
import platform
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ..checkpoints.fingerprint import fingerprint
from ..common.atomic import write_text
from ..common.command_line import command
from ..common.toml import write_toml
from .checkpoint import checkpoints, read_rows
from .config import read_config
from .processes import WORLD
from .stage import Stage
from .tables import resolve

log = logging.getLogger(__name__)

CONFIG, STARTS = "config.toml", "starts.jsonl"
PACKAGES = ("torch", "accelerate", "peft", "safetensors", "numpy", "pillow")
FIXED = (
    "[train] precision", "[train] frozen", "[train] lr_factors",
    *(f"[control] {key}" for key in ("hints", "blocks", "widths", "repeats")),
    *(f"[distill] {key}" for key in ("guidance", "steps")),
)  # fmt: skip
DROPOUT = "dropout"  # the key of [lora] that may change


def record_start(folder: Path, config: Mapping[str, Any], stage: Stage[Any]) -> None:
    """Writes the resolved configuration to config.toml, and appends a row about this start to starts.jsonl.

    If the folder has checkpoints, logs what differs from their configuration. ValueError if they come from another base
    model, precision, kind of adapter, ControlNet or student.
    """
    bases = {str(base): fingerprint(base) for base in stage.bases}
    starts = read_starts(folder)
    if checkpoints(folder) and (folder / CONFIG).is_file() and starts:
        before = resolve(stage.name, read_config(folder / CONFIG, []))  # with defaults of keys that are new since
        differences = changes(before, config)
        fixed = {key: x for key, x in differences.items() if _is_fixed(key)}
        if sorted(starts[-1]["bases"].values()) != sorted(bases.values()):
            fixed |= {"base model": (", ".join(starts[-1]["bases"]), ", ".join(bases))}
        if fixed:
            raise ValueError(
                f"{folder} has checkpoints of a run with another {describe(fixed)}: choose another run folder, or "
                "restore the configuration"
            )
        if differences:
            log.info("changed since the last start: %s", describe(differences))
    row = {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command(sys.argv[1:]),
        "processes": int(os.environ.get(WORLD, "1")),
        "seed": config["train"]["seed"],
        "bases": bases,
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
    }
    text = f"# The configuration of this run, with all defaults.\n{write_toml(config)}"
    write_text(folder / CONFIG, text)
    rows = "".join(f"{json.dumps(start)}\n" for start in [*starts, row])
    write_text(folder / STARTS, rows)


def read_starts(folder: Path) -> list[dict[str, Any]]:
    """Returns the rows of starts.jsonl, oldest first, without an incomplete last one."""
    return read_rows(folder / STARTS)


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Returns the values that differ between two configurations, as read from TOML, by "[table] key" or key."""
    one, other = _flat(before), _flat(now)
    return {key: (one.get(key), other.get(key)) for key in {**one, **other} if one.get(key) != other.get(key)}


def describe(differences: Mapping[str, tuple[Any, Any]]) -> str:
    """Returns differences in words."""
    return ", ".join(f"{key} ({_shown(before)}, now {_shown(now)})" for key, (before, now) in differences.items())


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values of all tables by "[table] key", with lists and dates as JSON has them."""
    tables = {name: x for name, x in config.items() if isinstance(x, Mapping)}
    flat = {name: x for name, x in config.items() if name not in tables}
    flat |= {f"[{name}] {key}": x for name, table in tables.items() for key, x in table.items() if x is not None}
    return {key: json.loads(json.dumps(x, default=str)) for key, x in flat.items()}


def _is_fixed(key: str) -> bool:
    return key in FIXED or (key.startswith("[lora] ") and not key.endswith(f" {DROPOUT}"))


def _shown(value: Any) -> str:
    return "not set" if value is None else json.dumps(value, ensure_ascii=False)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
