"""The sheet of what the shipped model makes of pictures: `python -m tools.demo.edits`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from wuerstchen_core.demo.artwork import CANVAS, draw
from wuerstchen_core.demo.vocabulary import COLOURS, SIZES, THINGS, Scene, caption
from wuerstchen_core.inference.pipeline import WuerstchenPipeline

SHEET = Path(__file__).parents[2] / "docs" / "pictures.jpg"
COLUMNS, TILE = 6, 128  # of the sheet; pixels of a tile's shorter side
LARGE, SMALL = range(len(SIZES))


def edits_sheet(pipe: WuerstchenPipeline) -> Image.Image:
    """A row of inpainting (picture, mask, result), one of variations of its first picture, one of the way between."""
    cat, panda = _scene("cat", "blue", LARGE), _scene("panda", "yellow", LARGE)
    rows = [
        _inpainted(pipe, _scene("red apple", "blue", SMALL), _scene("cat", "blue", SMALL))
        + _inpainted(pipe, _scene("house", "green", SMALL), _scene("robot", "green", SMALL)),
        [draw(cat), *pipe.variations(draw(cat), strength=0.8, count=COLUMNS - 1, seed=1)],
        pipe.interpolate(draw(cat), draw(panda), steps=COLUMNS, seed=1),
    ]
    return tiled(rows, COLUMNS)


def tiled(rows: Sequence[Sequence[Image.Image]], columns: int) -> Image.Image:
    """A sheet of rows of pictures, one below the other, as wide as so many squares."""
    small = [[_tile(image) for image in row] for row in rows]
    made = Image.new("RGB", (columns * TILE, sum(row[0].height for row in small)))
    y = 0
    for row in small:
        for x, image in enumerate(row):
            made.paste(image, (x * image.width, y))
        y += row[0].height
    return made


def _tile(image: Image.Image) -> Image.Image:
    width, height = (side * TILE // min(image.size) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def _scene(thing: str, colour: str, size: int) -> Scene:
    return Scene([known.name for known in THINGS].index(thing), list(COLOURS).index(colour), size)


def _inpainted(pipe: WuerstchenPipeline, before: Scene, after: Scene) -> list[Image.Image]:
    edge = list(SIZES.values())[before.size]
    start = (CANVAS - edge) // 2
    mask = Image.new("L", (CANVAS, CANVAS))
    mask.paste(255, (start, start, start + edge, start + edge))
    return [draw(before), mask.convert("RGB"), *pipe.inpaint(draw(before), mask, caption(after), seed=1)]


def remake(pipe: WuerstchenPipeline) -> None:
    """Write the sheet."""
    edits_sheet(pipe).save(SHEET, quality=90)


if __name__ == "__main__":
    remake(WuerstchenPipeline.load("demo"))
