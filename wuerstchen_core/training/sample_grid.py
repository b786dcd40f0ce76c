"""Grids of images that show how far a training is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image
from torch import Tensor

from ..inference.images import to_pictures

COLUMNS, TILE = 12, 128  # images in a row; width of each in pixels


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
