"""Checkpoints and the log of a run: written whole or not at all, and read back exactly."""

from __future__ import annotations

import json
import logging
import pickle
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch

from ..common.atomic import replace_file

log = logging.getLogger(__name__)

LOG = "log.jsonl"
UNREADABLE = (RuntimeError, ValueError, LookupError, EOFError, TypeError, AttributeError, pickle.UnpicklingError)


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, the newest first."""
    return sorted(folder.glob("checkpoint-*.pt"), reverse=True)


def write_checkpoint(folder: Path, step: int, contents: dict[str, Any], keep: int) -> None:
    """Write a checkpoint, and only then remove what goes beyond the newest `keep`. OSError if it can't be written."""
    path = folder / f"checkpoint-{step:08d}.pt"
    try:
        replace_file(path, partial(torch.save, contents))
    except (RuntimeError, OSError) as error:  # of a full disk, torch says the first
        raise OSError(
            f"{path} was not written ({shorten(str(error), 80)}): see that the disk has room, then go on from the last"
        ) from error
    for path in checkpoints(folder)[keep:]:
        path.unlink()


def read_checkpoint(folder: Path, load: Callable[[dict[str, Any]], object]) -> dict[str, Any] | None:
    """Let `load` take the newest checkpoint; None if there is none. ValueError if it can't be read."""
    path = next(iter(checkpoints(folder)), None)
    if path is None:
        return None
    try:
        contents: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        load(contents)
    except torch.OutOfMemoryError:
        raise
    except UNREADABLE as error:
        raise ValueError(
            f"{path} is damaged or of a run with another [model] or muon_lr: restore these, delete the file to go on "
            "from the one before, or choose another run folder"
        ) from error
    log.info("going on from step %d of %s", contents["step"], path)
    return contents


def append_row(folder: Path, row: dict[str, Any]) -> None:
    """Add a row to the log."""
    with (folder / LOG).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def rows_until(folder: Path, step: int) -> list[dict[str, Any]]:
    """The rows of the log up to a step, without a last one that an interrupt cut short."""
    path = folder / LOG
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return [row for row in rows if row["step"] <= step]


def write_rows(folder: Path, rows: Iterable[dict[str, Any]]) -> None:
    """The log anew."""
    text = "".join(f"{json.dumps(row)}\n" for row in rows)
    replace_file(folder / LOG, lambda part: part.write_text(text, encoding="utf-8"))
