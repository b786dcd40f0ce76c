"""Grids of images that show the progress of a training."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from textwrap import wrap

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ..common.atomic import replace_file
from ..inference.images import to_pictures
from .captions import SIZE, Font, font_for

COLUMNS, TILE = 12, 128  # most images in a row; width of each in pixels
LARGEST, GAP, LINE, MARGIN = 256, 16, 18, 4  # of `prompt_grid`, in pixels: longest side of an image, distances
INK, PAPER = (230, 230, 230), (24, 24, 24)


def sample_grid(rows: Sequence[Tensor]) -> Image.Image:
    """Returns a grid of image batches [B, 3, H, W] in [0, 1]: a line of tiles per batch and `COLUMNS` images."""
    lines, columns = [], min(COLUMNS, len(rows[0]))
    for chunks in zip(*(images.split(COLUMNS) for images in rows), strict=True):
        for images in chunks:
            size = TILE, TILE * images.shape[-2] // images.shape[-1]
            tiles = [np.asarray(picture.resize(size, Image.Resampling.LANCZOS)) for picture in to_pictures(images)]
            tiles += [np.zeros_like(tiles[0])] * (columns - len(tiles))
            lines.append(np.concatenate(tiles, axis=1))
    return Image.fromarray(np.concatenate(lines, axis=0))


def prompt_grid(
    prompts: Sequence[str], seeds: Sequence[int], groups: Mapping[str, Sequence[Image.Image]]
) -> Image.Image:
    """Returns a grid with a line of images for each prompt, below its text, and a block of columns for each group.

    `groups` are the images of a model by its title, in the order of the prompts, and of `seeds` for each prompt. Images
    are scaled to at most `LARGEST` pixels. Without a font that has its letters, a prompt is shown as its number.
    """
    images = [image for group in groups.values() for image in group]
    scale = min(1.0, LARGEST / max(max(image.size) for image in images))
    width, height = (round(scale * max(sides)) for sides in zip(*(image.size for image in images), strict=True))
    block = len(seeds) * width
    font = ImageFont.load_default(SIZE)
    total = MARGIN + len(groups) * (block + GAP) - GAP + MARGIN
    captions = [_caption(prompt, number, total - 2 * MARGIN) for number, prompt in enumerate(prompts, 1)]
    header = LINE * (2 if len(seeds) > 1 else 1) + MARGIN
    grid = Image.new("RGB", (total, header + sum(LINE * len(text) + height + GAP for text, _ in captions)), PAPER)
    draw = ImageDraw.Draw(grid)
    lefts = [MARGIN + number * (block + GAP) for number in range(len(groups))]
    for title, left in zip(groups, lefts, strict=True):
        draw.text((left, MARGIN), title, INK, font)
        for column, seed in enumerate(seeds if len(seeds) > 1 else ()):
            draw.text((left + column * width, MARGIN + LINE), f"seed {seed}", INK, font)
    top = header
    for line, (text, own) in enumerate(captions):
        draw.multiline_text((MARGIN, top), "\n".join(text), INK, own, spacing=LINE - SIZE)
        top += LINE * len(text)
        for group, left in zip(groups.values(), lefts, strict=True):
            for column, image in enumerate(group[line * len(seeds) : (line + 1) * len(seeds)]):
                size = round(scale * image.width), round(scale * image.height)
                grid.paste(image.resize(size, Image.Resampling.LANCZOS), (left + column * width, top))
        top += height + GAP
    return grid


def _caption(prompt: str, number: int, width: int) -> tuple[list[str], Font]:
    """Returns the lines of a caption of at most `width` pixels, and its font."""
    text, font = prompt.strip() or "(no words)", font_for(prompt)
    if font is None:
        text, font = f"prompt {number}", ImageFont.load_default(SIZE)
    mean = max(font.getlength(x) / len(x) for x in (text, "abcdefghijklmnopqrstuvwxyz "))
    return wrap(text, max(10, int(width / mean))), font


def write_grid(path: Path, grid: Image.Image, prompts: Sequence[str] = ()) -> None:
    """Writes a grid as a PNG file, with its prompts as the JSON list of the text `prompts`."""
    texts = PngInfo()
    if prompts:
        texts.add_itxt("prompts", json.dumps(list(prompts), ensure_ascii=False))
    replace_file(path, partial(grid.save, format="PNG", pnginfo=texts))
