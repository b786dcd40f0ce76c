"""Reads pictures and masks, and converts them to tensors and back."""

from __future__ import annotations

import struct
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from typing import BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ..common.geometry import LARGEST, MULTIPLE, check_size, nearest_legal

Picture = str | PathLike[str] | Image.Image


def open_picture(picture: Picture | BinaryIO, name: str = "") -> Image.Image:
    """Returns a picture, or the one in a file, as 8-bit RGB: EXIF orientation applied, transparency over white.

    CMYK is converted without colour profiles. Raises ValueError if the file is not a picture; the message calls it
    `name`, which is needed for open files only.
    """
    return _read(picture, name, "white").convert("RGB")


def open_mask(mask: Picture) -> Image.Image:
    """Returns a mask, or the one in a file, as 8-bit grey, with transparency over black. White is to be generated."""
    return _read(mask, "", "black").convert("L")


def picture_size(picture: str | PathLike[str] | BinaryIO, name: str = "") -> tuple[int, int]:
    """Returns the width and height of `open_picture`'s result from the file's header. Errors as there."""
    with _opened(picture, name or str(picture)) as file:
        if file.format == "TIFF":  # only newer versions of Pillow have transposed its size already
            return ImageOps.exif_transpose(file).size
        # The base class's method, since PNG's own decodes the whole picture to find EXIF data at its end.
        orientation = Image.Image.getexif(file).get(ExifTags.Base.Orientation)
        return (file.height, file.width) if orientation in (5, 6, 7, 8) else file.size  # those are turned by 90 degrees


def legal_size(width: int, height: int) -> tuple[int, int]:
    """Returns the legal size nearest to a picture's, which is first scaled down if a side is too long."""
    scale = min(1.0, LARGEST / max(width, height))
    return nearest_legal(round(width * scale)), nearest_legal(round(height * scale))


def read_pixels(picture: Picture, width: int | None = None, height: int | None = None) -> Tensor:
    """Returns a picture as [1, 3, height, width] in [0, 1], scaled to cover this size and cropped around its centre.

    None stands for the legal side nearest to the picture's own.
    """
    opened = open_picture(picture)
    nearest = legal_size(*opened.size)
    size = nearest[0] if width is None else width, nearest[1] if height is None else height
    check_size(*size)
    return to_pixels(ImageOps.fit(opened, size, Image.Resampling.LANCZOS))


def read_batch(pictures: Picture | Sequence[Picture], width: int | None = None, height: int | None = None) -> Tensor:
    """Returns one or several pictures as [B, 3, height, width], see `read_pixels`. ValueError if their sizes differ."""
    several = [pictures] if isinstance(pictures, str | PathLike | Image.Image) else list(pictures)
    if not several:
        raise ValueError("there is no picture: give at least one")
    batch = [read_pixels(picture, width, height) for picture in several]
    sizes = {f"{pixels.shape[-1]}x{pixels.shape[-2]}" for pixels in batch}
    if len(sizes) > 1:
        raise ValueError(
            f"the pictures differ in size ({' and '.join(sorted(sizes)[:2])} pixels): give width and height, or pass "
            "them one by one"
        )
    return torch.cat(batch)


def read_masked(picture: Picture, mask: Picture) -> tuple[Tensor, Tensor]:
    """Returns a picture [1, 3, H, W] and its mask [1, 1, H, W], both scaled down if a side is above 2048 pixels.

    Raises ValueError if their sizes differ or the mask is empty.
    """
    opened, opened_mask = open_picture(picture), open_mask(mask)
    if opened.size != opened_mask.size:
        raise ValueError(
            f"the mask is {opened_mask.width}x{opened_mask.height} pixels and the picture "
            f"{opened.width}x{opened.height}: give a mask of the picture's size"
        )
    mask_pixels = to_pixels(opened_mask)
    if not mask_pixels.any():
        raise ValueError("the mask is empty: make the part to generate white, the part to keep black")
    if max(opened.size) > LARGEST:
        scale = LARGEST / max(opened.size)
        width, height = (max(1, round(side * scale)) for side in opened.size)
        opened = opened.resize((width, height), Image.Resampling.LANCZOS)
        mask_pixels = F.adaptive_max_pool2d(mask_pixels, (height, width))  # keeps thin lines
    return to_pixels(opened), mask_pixels


def read_extended(picture: Picture, left: int, top: int, right: int, bottom: int) -> tuple[Tensor, Tensor]:
    """Returns a picture [1, 3, H, W] with borders of repeated edge pixels, and a mask [1, 1, H, W] of the borders.

    Raises ValueError if a border is below 0, all are 0, or a side with its borders exceeds 2048 pixels.
    """
    pixels, pad = to_pixels(open_picture(picture)), (left, right, top, bottom)
    if min(pad) < 0 or max(pad) == 0:
        raise ValueError(
            f"borders of {left}, {top}, {right} and {bottom} pixels (left, top, right, bottom) cannot be added: give "
            "at least one above 0, and none below"
        )
    width, height = pixels.shape[-1] + left + right, pixels.shape[-2] + top + bottom
    if max(width, height) > LARGEST:
        raise ValueError(f"{width}x{height} pixels are too many: choose smaller borders, for at most {LARGEST} a side")
    return F.pad(pixels, pad, mode="replicate"), F.pad(torch.zeros_like(pixels[:, :1]), pad, value=1.0)


def pad_to_legal(pixels: Tensor) -> Tensor:
    """Pads pixels [B, c, H, W] at the right and bottom to multiples of 64 by repeating their edges."""
    height, width = pixels.shape[-2:]
    return F.pad(pixels, (0, -width % MULTIPLE, 0, -height % MULTIPLE), mode="replicate")


def to_pixels(image: Image.Image) -> Tensor:
    """Returns a picture in RGB or grey as [1, 3 or 1, H, W] in [0, 1]."""
    pixels = torch.from_numpy(np.array(image, dtype=np.float32))
    return pixels.reshape(image.height, image.width, -1).permute(2, 0, 1)[None] / 255


def to_pictures(images: Tensor) -> list[Image.Image]:
    """Returns images [B, 3 or 1, H, W] in [0, 1] (clamped) as PIL images in RGB or grey."""
    pixels = images.float().clamp(0, 1).mul(255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(rows.squeeze(-1) if rows.shape[-1] == 1 else rows) for rows in pixels]


def _read(picture: Picture | BinaryIO, name: str, background: str) -> Image.Image:
    """Returns a picture in 8 bits with its EXIF orientation applied, transparency over a background."""
    if isinstance(picture, Image.Image):
        image = ImageOps.exif_transpose(picture)
    else:
        with _opened(picture, name or str(picture)) as file:
            image = ImageOps.exif_transpose(file)
    if image.mode == "F":
        raise ValueError("the brightness of white in floating-point pictures is undefined: save it with 8 or 16 bits")
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow's own conversion to 8 bits would clip
        values = np.asarray(image).astype(np.float64)
        if image.mode != "I" or values.max() > 255:  # older versions of Pillow use I for 16 bits too
            values = values / 257  # 65535 / 255
        return Image.fromarray(values.round().clip(0, 255).astype(np.uint8))
    if not image.has_transparency_data:
        return image
    return Image.alpha_composite(Image.new("RGBA", image.size, background), image.convert("RGBA"))


@contextmanager
def _opened(picture: str | PathLike[str] | BinaryIO, name: str) -> Iterator[Image.Image]:
    """Opens a picture's file with Pillow. Errors inside the block become a ValueError that names the file."""
    try:
        with warnings.catch_warnings():  # Pillow warns above 89 million pixels and raises above twice as many
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(picture) as file:
                yield file
    except FileNotFoundError:
        raise ValueError(f"{name} does not exist: check the path") from None
    except Image.DecompressionBombError:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0) // 1_000_000
        raise ValueError(f"{name} has more than {limit} million pixels: scale it down first") from None
    except (UnidentifiedImageError, IsADirectoryError):
        raise ValueError(f"{name} is not a readable picture: give a PNG, JPEG or WebP file") from None
    except (OSError, SyntaxError, TypeError, struct.error) as error:  # Pillow's, for broken PNG and EXIF data
        raise ValueError(f"{name} is truncated or damaged ({error}): save it again") from error
