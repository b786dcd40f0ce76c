"""PIL pictures to tensors and back."""

from __future__ import annotations

from os import PathLike

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from .diffusion.sizes import LARGEST, check_size, nearest_legal


def open_picture(picture: str | PathLike[str] | Image.Image) -> Image.Image:
    """A picture, or the file of one, as RGB: turned as its EXIF data says, transparency on white."""
    if not isinstance(picture, Image.Image):
        with Image.open(picture) as file:
            return open_picture(file)
    upright = ImageOps.exif_transpose(picture)
    if upright.has_transparency_data:
        white = Image.new("RGBA", upright.size, "white")
        upright = Image.alpha_composite(white, upright.convert("RGBA"))
    return upright.convert("RGB")


def legal_size(width: int, height: int) -> tuple[int, int]:
    """The legal size nearest to that of a picture, which is first scaled down if a side is too long."""
    scale = min(1.0, LARGEST / max(width, height))
    return nearest_legal(round(width * scale)), nearest_legal(round(height * scale))


def read_pixels(picture: str | PathLike[str] | Image.Image, width: int | None, height: int | None) -> Tensor:
    """A picture, or the file of one, as [1, 3, height, width] in [0, 1]: scaled to cover the size, cropped around its
    centre. A side that is None is the legal one nearest to the picture's own."""
    opened = open_picture(picture)
    own = legal_size(*opened.size)
    size = own[0] if width is None else width, own[1] if height is None else height
    check_size(*size)
    fitted = ImageOps.fit(opened, size, Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(fitted, dtype=np.float32))
    return pixels.permute(2, 0, 1)[None] / 255


def to_pictures(images: Tensor) -> list[Image.Image]:
    """Images [B, 3, H, W], clamped to [0, 1], as PIL pictures."""
    pixels = images.clamp(0, 1).mul(255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(rows) for rows in pixels]
