"""Grids of images that show how far a training is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image
from torch import Tensor

COLUMNS, TILE = 12, 128  # images in a row; width of each in pixels


def sample_grid(rows: Sequence[Tensor]) -> Image.Image:
    """Returns a grid of image batches [B, 3, H, W] in [0, 1]: a row for each, repeated every `COLUMNS` images."""
    lines = []
    for chunks in zip(*(images.clamp(0, 1).split(COLUMNS) for images in rows), strict=True):
        for images in chunks:
            tiles = [_tile(image) for image in images]
            tiles += [np.zeros_like(tiles[0])] * (COLUMNS - len(tiles))
            lines.append(np.concatenate(tiles, axis=1))
    return Image.fromarray(np.concatenate(lines, axis=0))


def _tile(image: Tensor) -> np.ndarray:
    array = (image.float().cpu().permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    size = TILE, TILE * array.shape[0] // array.shape[1]
    return np.asarray(Image.fromarray(array).resize(size, Image.Resampling.LANCZOS))
