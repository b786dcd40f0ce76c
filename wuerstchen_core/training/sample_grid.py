"""Sheets of pictures to look at."""

from __future__ import annotations

import numpy as np
from PIL import Image
from torch import Tensor


def sample_grid(rows: list[Tensor], columns: int = 12, width: int = 128) -> Image.Image:
    """Pictures [B, 3, H, W] in [0, 1], one row of the sheet (or more, if they are many) each."""
    lines = []
    for images in filter(len, rows):
        for part in images.clamp(0, 1).split(columns):
            tiles = [np.asarray(_tile(image, width)) for image in part]
            tiles += [np.zeros_like(tiles[0])] * (columns - len(tiles))
            lines.append(np.concatenate(tiles, axis=1))
    return Image.fromarray(np.concatenate(lines, axis=0))


def _tile(image: Tensor, width: int) -> Image.Image:
    array = (image.float().cpu().permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    return Image.fromarray(array).resize((width, width * array.shape[0] // array.shape[1]), Image.Resampling.LANCZOS)
