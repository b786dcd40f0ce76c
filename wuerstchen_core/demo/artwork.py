"""Draw the scenes of the demo: Noto Emoji vector drawings on a flat background.

Only training and judging need this; it asks for `resvg-py`, which generation never imports.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .vocabulary import COLOURS, POSITIONS, SHAPES, SIZES, THINGS, Scene

CANVAS = 256  # pixels; the canvas that `SIZES` is given for
MARGIN = 8  # pixels between the edge and what is in a corner or beside another

_SVG = (
    '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
    'width="{width}" height="{height}" viewBox="0 0 {width} {height}">{body}</svg>'
)


@cache
def _artwork() -> dict[str, Any]:
    return json.loads(Path(__file__).with_name("artwork.json").read_text(encoding="utf-8"))


@cache
def _sprite(thing: int, edge: int) -> np.ndarray:
    """One drawing as float32 [edge, edge, 4]: colour 0..255 and opacity 0..1."""
    try:
        import resvg_py
    except ModuleNotFoundError as error:
        reason = "drawing the demo's pictures needs `pip install resvg-py`"
        raise ModuleNotFoundError(reason, name="resvg_py") from error
    art = _artwork()
    body = art["icons"][THINGS[thing].icon]
    svg = _SVG.format(width=art["width"], height=art["height"], body=body)
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=edge, height=edge))
    sprite = np.array(Image.open(io.BytesIO(png)).convert("RGBA"), dtype=np.float32)
    sprite[..., 3] /= 255.0
    return sprite


def _corner(place: int, edge: int, width: int, height: int, margin: int) -> tuple[int, int]:
    """The first column and row of a drawing."""
    if POSITIONS[place] == "centre":
        return (width - edge) // 2, (height - edge) // 2
    row, side = POSITIONS[place].split()
    return (margin if side == "left" else width - margin - edge), (margin if row == "top" else height - margin - edge)


def boxes(scene: Scene, canvas: int = CANVAS) -> list[tuple[int, int, int]]:
    """Where a scene's one or two things are: the first column, the first row and the edge of each, in pixels."""
    width, height = (side * canvas // CANVAS for side in list(SHAPES.values())[scene.shape])
    edge, margin = (round(x * canvas / CANVAS) for x in (list(SIZES.values())[scene.size], MARGIN))
    column, row = _corner(scene.position, edge, width, height, margin)
    columns = [column] if scene.other is None else [margin, width - margin - edge]
    return [(column, row, edge) for column in columns]


def _compose(scene: Scene, canvas: int) -> np.ndarray:
    """One scene as uint8 [H, W, 3]."""
    width, height = (side * canvas // CANVAS for side in list(SHAPES.values())[scene.shape])
    ground = np.array(list(COLOURS.values())[scene.colour], dtype=np.float32)
    picture = np.broadcast_to(ground, (height, width, 3)).copy()
    for thing, (column, row, edge) in zip(scene.things, boxes(scene, canvas), strict=True):
        sprite = _sprite(thing, edge)
        window = picture[row : row + edge, column : column + edge]
        window += (sprite[..., :3] - window) * sprite[..., 3:]
    return np.rint(picture).astype(np.uint8)


def draw(scene: Scene, canvas: int = CANVAS) -> Image.Image:
    """A scene as an RGB picture, `canvas` pixels on its shorter side, sizes scaled along."""
    return Image.fromarray(draw_all([scene], canvas)[0])


def draw_all(scenes: Iterable[Scene], canvas: int = CANVAS) -> np.ndarray:
    """Scenes of one shape as uint8 [N, H, W, 3]; each drawing is rendered once per size."""
    if canvas < 16:
        raise ValueError(f"canvas must be at least 16 pixels, got {canvas}")
    pictures = [_compose(scene, canvas) for scene in scenes]
    if not pictures:
        return np.zeros((0, canvas, canvas, 3), dtype=np.uint8)
    return np.stack(pictures)
