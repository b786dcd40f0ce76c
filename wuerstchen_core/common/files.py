"""Files that are read."""

from __future__ import annotations

import os
from pathlib import Path

LARGEST_TEXT = 100_000_000  # bytes of a file of text
STDIN = Path("/dev/stdin")


def check_file(path: str | os.PathLike[str]) -> None:
    """Raises ValueError if a path is a named pipe, a socket or a device, which could be read without end."""
    path = Path(path)
    if path.exists() and not path.is_file() and not path.is_dir():
        raise ValueError(f"{path} is a pipe or a device: give a file")


def read_text_file(path: Path) -> bytes:
    """Returns the bytes of a file of text. ValueError if it is larger than LARGEST_TEXT, or a pipe other than STDIN."""
    if path != STDIN:
        check_file(path)
    with path.open("rb") as file:
        data = file.read(LARGEST_TEXT + 1)
    if len(data) > LARGEST_TEXT:
        raise ValueError(f"{path} has more than {LARGEST_TEXT // 1_000_000} MB: give a file of text, or divide it")
    return data
