"""Where pictures go, and how they are written."""

from __future__ import annotations

import itertools
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

METADATA_KEY = "wuerstchen"  # of the PNG text that says how a picture was made
SLUG_LENGTH = 60
ENDINGS = (".png", ".jpg", ".jpeg", ".webp")


def slug(prompt: str) -> str:
    """A file name, without ending, made of a prompt's letters and digits."""
    words = re.sub(r"[\W_]+", "-", prompt.casefold()).strip("-")
    return words[:SLUG_LENGTH].rstrip("-") or "picture"


def check_output(output: Path | None) -> None:
    """Raise ValueError unless pictures can be written to `output`."""
    if output is None or output.is_dir():
        return
    if not output.parent.is_dir():
        raise ValueError(f"the folder {output.parent} does not exist: create it, or give another --output")
    if output.suffix.lower() not in ENDINGS:
        raise ValueError(f"{output} names no kind of picture: let it end in one of {', '.join(ENDINGS)}")


def output_path(output: Path | None, prompt: str, number: int | None) -> Path:
    """Where a picture goes; `number` counts pictures of one run. Only a file that was named is ever overwritten."""
    if output is not None and not output.is_dir():
        return output if number is None else output.with_stem(f"{output.stem}-{number + 1}")
    folder, stem = output or Path(), slug(prompt)
    names = (f"{stem}{f'-{i}' if i > 1 else ''}.png" for i in itertools.count(1))
    return next(folder / name for name in names if not (folder / name).exists())


def save_picture(image: Image.Image, path: Path, made: dict[str, Any]) -> None:
    """Write a picture, complete or not at all; a PNG carries as text how it was `made`."""
    draft = path.with_name(f".{os.getpid()}.part{path.suffix}")
    try:
        image.save(draft, pnginfo=png_text(made), quality=95)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def png_text(made: dict[str, Any]) -> PngInfo:
    """The text of a PNG that says how it was `made`."""
    from PIL.PngImagePlugin import PngInfo

    text = PngInfo()
    text.add_itxt(METADATA_KEY, json.dumps(made, ensure_ascii=False))
    return text
