"""Output file names, and saving images."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ..common.atomic import check_room, create_file, replace_file

if TYPE_CHECKING:
    from PIL import Image

SLUG_LENGTH = 60
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


def slug(prompt: str) -> str:
    """Returns a file name, without suffix, from a prompt's letters and digits."""
    words = re.sub(r"[\W_]+", "-", prompt.casefold()).strip("-")
    return words[:SLUG_LENGTH].rstrip("-") or "picture"


def check_output(output: Path | None) -> None:
    """Raises ValueError or OSError unless images can be written to `output`."""
    if output is None or output.is_dir():
        return check_room((output or Path()) / "picture.png")
    if not output.parent.is_dir():
        raise ValueError(f"the folder {output.parent} does not exist: create it, or choose another --output")
    if output.suffix.lower() not in FORMATS:
        raise ValueError(f"{output} has no supported image format: choose one of {', '.join(FORMATS)}")
    check_room(output)


def save_output(image: Image.Image, output: Path | None, title: str, number: int | None, metadata: bool) -> Path:
    """Writes an image and returns its path; `number` is its index if a run has more than one.

    Only a file named by `output` is overwritten. Other names get the next number that is free, and no two processes
    the same.
    """
    if output is None or output.is_dir():
        folder, stem, ending = output or Path(), slug(title), ".png"
        names = (folder / f"{stem}{f'-{i}' if i > 1 else ''}{ending}" for i in itertools.count(1))
    elif number is None:
        save_image(image, output, metadata)
        return output
    else:
        ending = output.suffix
        names = (output.with_stem(f"{output.stem}-{i}") for i in itertools.count(number + 1))
    return create_file(names, _writer(image, ending, metadata))


def save_image(image: Image.Image, path: Path, metadata: bool = True) -> None:
    """Writes an image atomically, with the texts that say how it was made unless `metadata` is False."""
    replace_file(path, _writer(image, path.suffix, metadata))


def _writer(image: Image.Image, ending: str, metadata: bool) -> Callable[[Path], None]:
    """Returns a function that writes an image to a path in the format of an ending."""
    if not metadata:
        image.info.clear()
    return lambda path: image.save(path, format=FORMATS[ending.lower()], quality=95)
