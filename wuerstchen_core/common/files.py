"""Files that are read."""

from __future__ import annotations

import os
from pathlib import Path


def check_file(path: str | os.PathLike[str]) -> None:
    """Raises ValueError if a path is a named pipe, a socket or a device, which could be read without end."""
    path = Path(path)
    if path.exists() and not path.is_file() and not path.is_dir():
        raise ValueError(f"{path} is a pipe or a device: give a file")
