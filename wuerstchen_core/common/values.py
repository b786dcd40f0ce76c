"""Arguments that are paths, or lists of something."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def to_path(value: Any) -> Path:
    """Returns a text or path as a Path. Raises ValueError for anything else."""
    if not isinstance(value, str | os.PathLike):
        raise ValueError(f"{value!r:.60} cannot be used: give the path of a file or folder")
    return Path(value)


def to_list(name: str, value: Any, kind: Any) -> list[Any]:
    """Returns one value of a type, or several, as a list. Raises ValueError, with the `name`, for anything else."""
    if isinstance(value, kind):
        return [value]
    if not isinstance(value, Iterable):
        raise ValueError(f"{name} {value!r:.60} cannot be used: give one, or a list of them")
    return list(value)
