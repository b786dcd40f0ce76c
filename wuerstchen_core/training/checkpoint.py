"""Checkpoints and the log of a training run."""

from __future__ import annotations

import json
import logging
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..common.atomic import reason, replace_file, write_text
from ..common.memory import is_out_of_memory
from ..common.text import one_line, parse_json
from .config import LoopConfig

log = logging.getLogger(__name__)

LOG = "log.jsonl"
KEPT = "weights"  # the key of its rows about files of weights that are kept
UNREADABLE = (RuntimeError, ValueError, LookupError, EOFError, TypeError, AttributeError, pickle.UnpicklingError)


def checkpoints(folder: Path) -> list[Path]:
    """Returns the checkpoints in a folder, newest first."""
    found = [path for path in folder.glob("checkpoint-*.pt") if path.stem.removeprefix("checkpoint-").isdecimal()]
    return sorted(found, reverse=True)


def newest_step(folder: Path) -> int:
    """Returns the step of the newest checkpoint in a folder, 0 if there is none."""
    return max((int(path.stem.split("-")[1]) for path in checkpoints(folder)), default=0)


def space_needed(file: Path, config: LoopConfig, start: int, checkpoint: int, weights: int) -> int:
    """Returns the bytes that a run needs on the disk from step `start` on, of checkpoints and weights.

    Those that are there already are not counted. `file` is that of the newest weights, `checkpoint` and `weights` are
    the bytes of one file.
    """
    found = len(checkpoints(file.parent))
    saved = -(-config.steps // config.save_every) - start // config.save_every  # also at the last step
    kept = config.steps // config.keep_every - start // config.keep_every if config.keep_every else 0
    new = max(0, min(found + saved, config.keep + 1) - found)  # an old one is removed after a new one is written
    return new * checkpoint + (kept + 2 - file.exists()) * weights  # also the newest, and its draft


def weights_name(stem: str, step: int) -> str:
    """Returns the name of the file with the weights at a step of a stage whose files have this stem."""
    return f"{stem}-{step:06d}.safetensors"


def record_weights(path: Path, step: int) -> None:
    """Adds the file with the weights at a step, which is kept, to the log in its folder."""
    append_row(path.parent, {"step": step, KEPT: path.name})


def kept_weights(folder: Path, stem: str) -> list[Path]:
    """Returns a run's weight files: STEM-000500.safetensors and so on, then STEM.safetensors.

    They are those in the log: the folder may have more, of an earlier run.
    """
    names = {row[KEPT] for row in read_log(folder) if KEPT in row}
    return [path for path in map(folder.joinpath, [*sorted(names), f"{stem}.safetensors"]) if path.is_file()]


def write_checkpoint(folder: Path, step: int, contents: dict[str, Any], keep: int) -> None:
    """Writes a checkpoint, then removes all but the newest `keep`. OSError names the file if the disk is full."""
    path = folder / f"checkpoint-{step:08d}.pt"
    try:
        replace_file(path, partial(torch.save, contents))
    except RuntimeError as error:  # torch raises this, not OSError, on a full disk
        raise OSError(f"{path} was not written: {one_line(error)[:80]}; check that the disk has space") from error
    remove_old(folder, keep)


def remove_old(folder: Path, keep: int) -> None:
    """Removes all checkpoints in a folder but the newest `keep`."""
    for old in checkpoints(folder)[keep:]:
        old.unlink()


def read_checkpoint(folder: Path, load: Callable[[dict[str, Any]], object]) -> dict[str, Any] | None:
    """Passes the newest checkpoint to `load` and returns it; None if there is none. ValueError if it does not fit."""
    path = next(iter(checkpoints(folder)), None)
    if path is None:
        return None
    contents = load_checkpoint(path, load)
    log.info("resuming from step %d of %s", contents["step"], path)
    return contents


def load_checkpoint(path: Path, load: Callable[[dict[str, Any]], object] = lambda contents: None) -> dict[str, Any]:
    """Passes a checkpoint to `load` and returns it. ValueError if it is damaged or does not fit."""
    try:
        contents: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        load(contents)
    except UNREADABLE as error:
        if is_out_of_memory(error):
            raise
        raise ValueError(
            f"{path} is damaged, or comes from a run with another [model], optimizer or muon_lr: restore these, delete "
            "the file to resume from the previous checkpoint, or choose another run folder"
        ) from error
    return contents


def append_row(folder: Path, row: dict[str, Any]) -> None:
    """Appends a row to the log, in place of an incomplete last one. OSError names the file if the disk is full."""
    path = folder / LOG
    try:
        with path.open("ab+") as file:
            if size := file.tell():
                file.seek(size - 1)
                if file.read() != b"\n":
                    file.seek(0)
                    file.truncate(file.read().rfind(b"\n") + 1)
            file.write(f"{json.dumps(row)}\n".encode())
    except OSError as error:
        raise OSError(f"{path} was not written: {reason(error)}") from error


def read_log(folder: Path) -> list[dict[str, Any]]:
    """Returns the rows of the log, without an incomplete last one."""
    return read_rows(folder / LOG)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Returns the JSON tables in the lines of a file that a run writes, without an incomplete last one."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    try:
        return [dict(parse_json(line)) for line in lines if line.endswith("\n")]
    except (ValueError, TypeError):
        raise ValueError(f"{path} is damaged: restore it from a copy of the run folder, or delete it") from None


def truncate_log(folder: Path, last_step: int) -> float:
    """Removes an incomplete last line and rows after a step; returns the seconds in the last row of losses, or 0."""
    rows = [row for row in read_log(folder) if row["step"] <= last_step]
    text = "".join(f"{json.dumps(row)}\n" for row in rows)
    write_text(folder / LOG, text)
    return max((row.get("seconds", 0.0) for row in rows), default=0.0)
