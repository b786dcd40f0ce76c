"""Fonts for the captions of images: Pillow's own, and for scripts that it lacks, an installed one."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from PIL import ImageFont

SIZE = 13  # pixels
# Linux; macOS; Windows: of many scripts, of Chinese and Japanese, of Korean.
INSTALLED = (
    "DejaVuSans.ttf", "NotoSansCJK-Regular.ttc", "Arial Unicode.ttf", "segoeui.ttf", "msyh.ttc", "malgun.ttf",
)  # fmt: skip
NO_LETTER = "\uffff"  # drawn as any letter that a font lacks

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def font_for(text: str) -> Font | None:
    """Returns the first font that has all letters of a text; None if no installed one has."""
    letters = {letter for letter in text if not letter.isspace()}
    return next((font for font in _fonts() if all(_has(font, letter) for letter in letters)), None)


def _fonts() -> Iterator[Font]:
    yield ImageFont.load_default(SIZE)
    package = find_spec("matplotlib")
    folders = (package.submodule_search_locations or []) if package else []
    bundled = [str(Path(folder) / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf") for folder in folders]
    yield from filter(None, map(_load, (*bundled, *INSTALLED)))


@cache
def _load(name: str) -> Font | None:
    try:
        return ImageFont.truetype(name, SIZE)
    except OSError:
        return None


def _has(font: Font, letter: str) -> bool:
    drawn, missing = font.getmask(letter), font.getmask(NO_LETTER)
    return drawn.size != missing.size or bytes(drawn) != bytes(missing)
