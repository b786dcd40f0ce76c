"""Output file names, and saving images."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import TYPE_CHECKING

from ..common.atomic import replace_file

if TYPE_CHECKING:
    from PIL import Image

SLUG_LENGTH = 60
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


def slug(prompt: str) -> str:
    """Returns a file name, without suffix, from a prompt's letters and digits."""
    words = re.sub(r"[\W_]+", "-", prompt.casefold()).strip("-")
    return words[:SLUG_LENGTH].rstrip("-") or "picture"


def check_output(output: Path | None) -> None:
    """Raises ValueError unless images can be written to `output`."""
    if output is None or output.is_dir():
        return
    if not output.parent.is_dir():
        raise ValueError(f"the folder {output.parent} does not exist: create it, or choose another --output")
    if output.suffix.lower() not in FORMATS:
        raise ValueError(f"{output} has no supported image format: choose one of {', '.join(FORMATS)}")


def output_path(output: Path | None, title: str, number: int | None) -> Path:
    """Returns the path of an image; `number` is its index if a run has more than one.

    Only a file named by `output` is overwritten. Default names get a number if the file exists.
    """
    if output is not None and not output.is_dir():
        return output if number is None else output.with_stem(f"{output.stem}-{number + 1}")
    folder, stem = output or Path(), slug(title)
    names = (f"{stem}{f'-{i}' if i > 1 else ''}.png" for i in itertools.count(1))
    return next(folder / name for name in names if not (folder / name).exists())


def save_image(image: Image.Image, path: Path, metadata: bool = True) -> None:
    """Writes an image atomically, with the texts that say how it was made unless `metadata` is False."""
    if not metadata:
        image.info.clear()
    kind = FORMATS[path.suffix.lower()]
    replace_file(path, lambda draft: image.save(draft, format=kind, quality=95))
