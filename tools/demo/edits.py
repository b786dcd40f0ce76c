"""Generates docs/pictures.webp, the grid of edited images: `python -m tools.demo.edits`."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from wuerstchen_core.demo.artwork import CANVAS, draw
from wuerstchen_core.demo.vocabulary import COLOURS, SIZES, THINGS, Scene, caption
from wuerstchen_core.inference.pipeline import WuerstchenPipeline

from .. import DOCS

GRID = DOCS / "pictures.webp"
COLUMNS, TILE = 6, 128  # of the grid; pixels of a tile's shorter side
LARGE, SMALL = range(len(SIZES))


def edits_grid(pipe: WuerstchenPipeline) -> Image.Image:
    """Returns rows of inpainting (image, mask, result), variations of the first image, and an interpolation."""
    cat, panda = _scene("cat", "blue", LARGE), _scene("panda", "yellow", LARGE)
    rows = [
        _inpaint(pipe, _scene("red apple", "blue", SMALL), _scene("cat", "blue", SMALL))
        + _inpaint(pipe, _scene("house", "green", SMALL), _scene("robot", "green", SMALL)),
        [draw(cat), *pipe.variations(draw(cat), strength=0.8, count=COLUMNS - 1, seed=1)],
        pipe.interpolate(draw(cat), draw(panda), steps=COLUMNS, seed=1),
    ]
    return grid(rows, COLUMNS)


def grid(rows: Sequence[Sequence[Image.Image]], columns: int) -> Image.Image:
    """Returns rows of images one below the other, as wide as `columns` squares."""
    tiles = [[tile(image) for image in row] for row in rows]
    result = Image.new("RGB", (columns * TILE, sum(row[0].height for row in tiles)))
    y = 0
    for row in tiles:
        for x, image in enumerate(row):
            result.paste(image, (x * image.width, y))
        y += row[0].height
    return result


def tile(image: Image.Image) -> Image.Image:
    """Returns an image with `TILE` pixels on the shorter side."""
    width, height = (side * TILE // min(image.size) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def _scene(thing: str, colour: str, size: int) -> Scene:
    return Scene([known.name for known in THINGS].index(thing), list(COLOURS).index(colour), size)


def _inpaint(pipe: WuerstchenPipeline, before: Scene, after: Scene) -> list[Image.Image]:
    edge = list(SIZES.values())[before.size]
    start = (CANVAS - edge) // 2
    mask = Image.new("L", (CANVAS, CANVAS))
    mask.paste(255, (start, start, start + edge, start + edge))
    return [draw(before), mask.convert("RGB"), *pipe.inpaint(draw(before), mask, caption(after), seed=1)]


def remake(pipe: WuerstchenPipeline) -> None:
    edits_grid(pipe).save(GRID, quality=80, method=6)


if __name__ == "__main__":
    remake(WuerstchenPipeline.load("demo"))
