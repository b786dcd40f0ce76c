"""Grids of images that show the progress of a training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import wrap

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..inference.images import to_pictures

COLUMNS, TILE = 12, 128  # images in a row; width of each in pixels
LARGEST, GAP, LINE, MARGIN = 256, 16, 18, 4  # of `prompt_grid`, in pixels: longest side of an image, distances
INK, PAPER = (230, 230, 230), (24, 24, 24)


def sample_grid(rows: Sequence[Tensor]) -> Image.Image:
    """Returns a grid of image batches [B, 3, H, W] in [0, 1]: one line of tiles per batch and `COLUMNS` images."""
    lines = []
    for chunks in zip(*(images.split(COLUMNS) for images in rows), strict=True):
        for images in chunks:
            size = TILE, TILE * images.shape[-2] // images.shape[-1]
            tiles = [np.asarray(picture.resize(size, Image.Resampling.LANCZOS)) for picture in to_pictures(images)]
            tiles += [np.zeros_like(tiles[0])] * (COLUMNS - len(tiles))
            lines.append(np.concatenate(tiles, axis=1))
    return Image.fromarray(np.concatenate(lines, axis=0))


def prompt_grid(
    prompts: Sequence[str], seeds: Sequence[int], groups: Mapping[str, Sequence[Image.Image]]
) -> Image.Image:
    """Returns a grid with a line of images for each prompt, below its text, and a block of columns for each group.

    `groups` are the images of a model by its title, in the order of the prompts, and of `seeds` for each prompt. Images
    are scaled to at most `LARGEST` pixels.
    """
    images = [image for group in groups.values() for image in group]
    scale = min(1.0, LARGEST / max(max(image.size) for image in images))
    width, height = (round(scale * max(sides)) for sides in zip(*(image.size for image in images), strict=True))
    block = len(seeds) * width
    font = ImageFont.load_default(13)
    total = MARGIN + len(groups) * (block + GAP) - GAP + MARGIN
    letters = max(10, int((total - 2 * MARGIN) / font.getlength("abcdefghijklmnopqrstuvwxyz ") * 27))
    texts = [wrap(prompt, letters) or ["(no words)"] for prompt in prompts]
    header = LINE * (2 if len(seeds) > 1 else 1) + MARGIN
    grid = Image.new("RGB", (total, header + sum(LINE * len(text) + height + GAP for text in texts)), PAPER)
    draw = ImageDraw.Draw(grid)
    lefts = [MARGIN + number * (block + GAP) for number in range(len(groups))]
    for title, left in zip(groups, lefts, strict=True):
        draw.text((left, MARGIN), title, INK, font)
        for column, seed in enumerate(seeds if len(seeds) > 1 else ()):
            draw.text((left + column * width, MARGIN + LINE), f"seed {seed}", INK, font)
    top = header
    for line, text in enumerate(texts):
        draw.multiline_text((MARGIN, top), "\n".join(text), INK, font, spacing=LINE - 13)
        top += LINE * len(text)
        for group, left in zip(groups.values(), lefts, strict=True):
            for column, image in enumerate(group[line * len(seeds) : (line + 1) * len(seeds)]):
                size = round(scale * image.width), round(scale * image.height)
                grid.paste(image.resize(size, Image.Resampling.LANCZOS), (left + column * width, top))
        top += height + GAP
    return grid
