"""Draws the demo's scenes: vector drawings of Noto Emoji on a flat background.

For training and evaluation only; needs the package resvg-py.
"""

from __future__ import annotations

import io
import json
import lzma
import random
from collections.abc import Sequence
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..common.geometry import Box
from .vocabulary import COLOURS, POSITIONS, SHAPES, SIZES, THINGS, Scene

CANVAS = 256  # pixels of the shorter side, for which SIZES, SHAPES and MARGIN are given
MARGIN = 8  # pixels between a thing in a corner, or one of several, and the edge

_SVG = (
    '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
    'width="{width}" height="{height}" viewBox="0 0 {width} {height}">{body}</svg>'
)


@cache
def artwork() -> dict[str, Any]:
    """Returns the size of the drawings' canvas, and their SVG code by name."""
    return json.loads(lzma.decompress(Path(__file__).with_name("artwork.json.xz").read_bytes()))


def render(thing: int, edge: int) -> np.ndarray:
    """Returns a drawing as float32 [edge, edge, 4]: colour 0..255 and opacity 0..1."""
    import resvg_py

    art = artwork()
    svg = _SVG.format(width=art["width"], height=art["height"], body=art["icons"][THINGS[thing].icon])
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=edge, height=edge))
    sprite = np.array(Image.open(io.BytesIO(png)).convert("RGBA"), dtype=np.float32)
    sprite[..., 3] /= 255.0
    return sprite


_sprite = cache(render)


def picture_size(shape: int, canvas: int = CANVAS) -> tuple[int, int]:
    """Returns width and height of a picture of a shape, by its index, with `canvas` pixels on the shorter side."""
    width, height = list(SHAPES.values())[shape]
    return width * canvas // CANVAS, height * canvas // CANVAS


def boxes(scene: Scene, canvas: int = CANVAS) -> list[Box]:
    """Returns the box, a square, of each thing in a scene."""
    width, height = picture_size(scene.shape, canvas)
    edge, margin = (round(x * canvas / CANVAS) for x in (list(SIZES.values())[scene.size], MARGIN))
    left, top = (width - edge) // 2, (height - edge) // 2
    if scene.position:
        row, side = POSITIONS[scene.position].split()
        left = margin if side == "left" else width - margin - edge
        top = margin if row == "top" else height - margin - edge
    count, sides = len(scene.things), (margin, width - margin - edge)
    if count == 3:
        return [(left, margin, edge, edge), *((side, height - margin - edge, edge, edge) for side in sides)]
    return [(x, top, edge, edge) for x in ([left] if count == 1 else sides)]


def random_boxes(scene: Scene, canvas: int, rng: random.Random) -> list[Box]:
    """Returns squares of random sizes at random places for the things in a scene, which do not overlap.

    The least size is three quarters of a small thing's, since details of smaller ones are lost in Stage C's latents.
    """
    width, height = picture_size(scene.shape, canvas)
    largest = {1: 0.9, 2: 0.5, 3: 0.4}[len(scene.things)]
    while True:
        found: list[Box] = []
        for _ in scene.things:
            edge = round(canvas * rng.uniform(0.36, largest))
            found.append((rng.randint(0, width - edge), rng.randint(0, height - edge), edge, edge))
        if not any(overlapping(*two) for two in combinations(found, 2)):
            return found


def overlapping(one: Box, other: Box) -> bool:
    """True if two boxes have a common pixel."""
    return all(one[i] < other[i] + other[i + 2] and other[i] < one[i] + one[i + 2] for i in (0, 1))


def draw(scene: Scene) -> Image.Image:
    """Returns a scene as an RGB image with 256 pixels on its shorter side."""
    return Image.fromarray(draw_all([scene])[0])


def draw_all(
    scenes: Sequence[Scene], canvas: int = CANVAS, placed: Sequence[Sequence[Box]] | None = None
) -> np.ndarray:
    """Returns scenes of one shape as uint8 [N, H, W, 3], with `canvas` pixels on the shorter side.

    `placed` are the boxes of the things in each scene, by default those of `boxes`.
    """
    pictures = []
    for number, scene in enumerate(scenes):
        width, height = picture_size(scene.shape, canvas)
        picture = np.empty((height, width, 3), dtype=np.float32)
        picture[:] = list(COLOURS.values())[scene.colour]
        places = boxes(scene, canvas) if placed is None else placed[number]
        for thing, (left, top, edge, _) in zip(scene.things, places, strict=True):
            sprite = (_sprite if placed is None else render)(thing, edge)
            window = picture[top : top + edge, left : left + edge]
            window += (sprite[..., :3] - window) * sprite[..., 3:]
        pictures.append(np.rint(picture).astype(np.uint8))
    return np.stack(pictures) if pictures else np.zeros((0, canvas, canvas, 3), dtype=np.uint8)
