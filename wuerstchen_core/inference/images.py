"""PIL pictures to tensors and back."""

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

from ..common.geometry import LARGEST, check_size, covering_legal, nearest_legal
from ..diffusion.masks import PAINTED

Picture = str | PathLike[str] | Image.Image

SIXTEEN_BITS = 257  # a 16-bit value is 257 times the 8-bit one: 65535 / 255
LYING = (5, 6, 7, 8)  # EXIF's orientations of a picture whose sides are swapped


def open_picture(picture: Picture | BinaryIO, name: str = "") -> Image.Image:
    """A picture, or the file of one, as RGB: turned as its EXIF data says, transparency on white, 16 bits cut to 8.

    CMYK is converted as Pillow does, without colour profiles. Raises ValueError where a file is no picture; it calls
    the file by `name`, which an open file needs.
    """
    upright = _in_8_bits(_upright(picture, name))
    if upright.has_transparency_data:
        upright = _on_ground(upright, "white")
    return upright.convert("RGB")


def open_mask(mask: Picture) -> Image.Image:
    """A mask, or the file of one, as grey: white is painted, black is kept, and so is what is transparent."""
    upright = _in_8_bits(_upright(mask))
    if upright.has_transparency_data:
        upright = _on_ground(upright, "black")
    return upright.convert("L")


def picture_size(picture: str | PathLike[str] | BinaryIO, name: str = "") -> tuple[int, int]:
    """Width and height of the file of a picture as `open_picture` would turn it, read off its header.

    Raises ValueError where a file is no picture; it calls the file by `name`, which an open file needs.
    """
    with _opened(picture, name or str(picture)) as file:
        if file.format == "TIFF":  # whose size only the newer Pillows have turned already
            return ImageOps.exif_transpose(file).size
        # By the base class: that of PNG decodes the whole picture, in case EXIF data stand behind it.
        lies = Image.Image.getexif(file).get(ExifTags.Base.Orientation) in LYING
        return (file.height, file.width) if lies else file.size


def legal_size(width: int, height: int) -> tuple[int, int]:
    """The legal size nearest to that of a picture, which is first scaled down if a side is too long."""
    scale = min(1.0, LARGEST / max(width, height))
    return nearest_legal(round(width * scale)), nearest_legal(round(height * scale))


def read_pixels(picture: Picture, width: int | None = None, height: int | None = None) -> Tensor:
    """A picture, or the file of one, as [1, 3, height, width] in [0, 1]: scaled to cover the size, cropped around its
    centre. A side that is None is the legal one nearest to the picture's own."""
    opened = open_picture(picture)
    own = legal_size(*opened.size)
    size = own[0] if width is None else width, own[1] if height is None else height
    check_size(*size)
    return to_pixels(ImageOps.fit(opened, size, Image.Resampling.LANCZOS))


def read_batch(pictures: Picture | Sequence[Picture], width: int | None = None, height: int | None = None) -> Tensor:
    """One picture or several, each as `read_pixels` does, as [B, 3, height, width]; they must end up in one size."""
    several = [pictures] if isinstance(pictures, str | PathLike | Image.Image) else list(pictures)
    if not several:
        raise ValueError("no picture was given: give at least one")
    read = [read_pixels(picture, width, height) for picture in several]
    sizes = {f"{pixels.shape[-1]}x{pixels.shape[-2]}" for pixels in read}
    if len(sizes) > 1:
        raise ValueError(
            f"the pictures would be {' and '.join(sorted(sizes)[:2])} pixels, but a batch has one size: "
            "give width and height, or hand them in one by one"
        )
    return torch.cat(read)


def read_masked(picture: Picture, mask: Picture) -> tuple[Tensor, Tensor]:
    """A picture [1, 3, H, W] and the mask of what to paint in it [1, 1, H, W], in the picture's own pixels.

    Both are scaled down where a side is above 2048 pixels. Raises ValueError where their sizes differ, or where the
    mask marks nothing.
    """
    opened, marked = open_picture(picture), open_mask(mask)
    if opened.size != marked.size:
        raise ValueError(
            f"the mask is {marked.width}x{marked.height} pixels and the picture {opened.width}x{opened.height}: "
            "give a mask of the picture's size"
        )
    mask_pixels = to_pixels(marked)
    if not (mask_pixels >= PAINTED).any():
        raise ValueError("the mask marks nothing: make white what is to be painted, black what is to be kept")
    if max(opened.size) > LARGEST:
        scale = LARGEST / max(opened.size)
        width, height = (max(1, round(side * scale)) for side in opened.size)
        opened = opened.resize((width, height), Image.Resampling.LANCZOS)
        mask_pixels = F.adaptive_max_pool2d(mask_pixels, (height, width))  # so that no thin line is lost
    return to_pixels(opened), mask_pixels


def widen(pixels: Tensor, mask: Tensor, borders: tuple[int, int, int, int]) -> tuple[Tensor, Tensor]:
    """A picture and its mask on a larger canvas, `borders` = left, top, right, bottom pixels wider, all to be painted.

    Raises ValueError where a border is below 0, all are 0, or the canvas has a side above 2048 pixels.
    """
    left, top, right, bottom = borders
    if min(borders) < 0 or max(borders) == 0:
        raise ValueError(
            f"borders of {left}, {top}, {right} and {bottom} pixels cannot be painted: give the pixels to add at the "
            "left, top, right or bottom, at least one of them above 0"
        )
    width, height = pixels.shape[-1] + left + right, pixels.shape[-2] + top + bottom
    if max(width, height) > LARGEST:
        raise ValueError(
            f"a canvas of {width}x{height} pixels is too large: choose smaller borders or scale the picture down, so "
            f"that no side is above {LARGEST}"
        )
    pad = (left, right, top, bottom)
    return F.pad(pixels, pad, mode="replicate"), F.pad(mask, pad, value=1.0)


def legal_canvas(pixels: Tensor) -> Tensor:
    """Pixels [B, c, H, W], at the right and at the bottom made up to multiples of 64 by repeating their edges."""
    height, width = pixels.shape[-2:]
    return F.pad(pixels, (0, covering_legal(width) - width, 0, covering_legal(height) - height), mode="replicate")


def to_pixels(image: Image.Image) -> Tensor:
    """A picture in RGB or grey as [1, 3 or 1, H, W] in [0, 1]."""
    pixels = torch.from_numpy(np.array(image, dtype=np.float32))
    return pixels.reshape(image.height, image.width, -1).permute(2, 0, 1)[None] / 255


def to_pictures(images: Tensor) -> list[Image.Image]:
    """Images [B, 3 or 1, H, W], clamped to [0, 1], as PIL pictures in RGB or grey."""
    pixels = images.float().clamp(0, 1).mul(255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(rows.squeeze(-1) if rows.shape[-1] == 1 else rows) for rows in pixels]


def _upright(picture: Picture | BinaryIO, name: str = "") -> Image.Image:
    if isinstance(picture, Image.Image):
        return ImageOps.exif_transpose(picture)
    with _opened(picture, name or str(picture)) as file:
        return ImageOps.exif_transpose(file)


@contextmanager
def _opened(picture: str | PathLike[str] | BinaryIO, name: str) -> Iterator[Image.Image]:
    """The file of a picture as Pillow opens it; what goes wrong in there is a ValueError that names it."""
    try:
        with warnings.catch_warnings():  # from 89 million pixels Pillow warns, from twice as many it raises
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(picture) as file:
                yield file
    except FileNotFoundError:
        raise ValueError(f"{name} does not exist") from None
    except Image.DecompressionBombError:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0) // 1_000_000
        raise ValueError(f"{name} has more than {limit} million pixels: scale it down first") from None
    except (UnidentifiedImageError, IsADirectoryError):
        raise ValueError(f"{name} is no picture that can be read: give a PNG, JPEG or WebP file") from None
    except (OSError, SyntaxError, TypeError, struct.error) as error:  # Pillow's own, for broken PNG and EXIF data
        raise ValueError(f"{name} is cut short or damaged ({error}): save it again") from error


def _in_8_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits as grey of 8, which Pillow's own conversion would clip; Pillow calls it I;16, older ones I."""
    if image.mode == "F":
        raise ValueError(
            "a picture of floating point numbers has no fixed white: save it with 8 or 16 bits a channel first"
        )
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image).astype(np.float64)
    if image.mode != "I" or values.max() > 255:
        values = values / SIXTEEN_BITS
    return Image.fromarray(values.round().clip(0, 255).astype(np.uint8))


def _on_ground(image: Image.Image, colour: str) -> Image.Image:
    return Image.alpha_composite(Image.new("RGBA", image.size, colour), image.convert("RGBA"))
