"""Reads pictures and masks, and converts them to tensors and back."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from ..common.geometry import LARGEST, MULTIPLE, check_size, nearest_legal
from ..common.numbers import to_int
from ..common.values import to_list
from .eight_bits import to_8_bits
from .image_files import opened, upright_size

TRACE = 4  # levels of 255 by which compression and editors change black and white

Picture = str | PathLike[str] | Image.Image


class Mask(NamedTuple):
    """A mask as 8-bit grey, where white is to be generated, and where it comes from: "alpha" or "luminance"."""

    image: Image.Image
    source: str

    @property
    def fraction(self) -> float:
        """The fraction of the picture that is generated, from 0 to 1; a grey pixel counts in part."""
        return float(np.asarray(self.image).mean()) / 255


def open_picture(picture: Picture | BinaryIO, name: str = "") -> Image.Image:
    """Returns a picture, or the one in a file, as 8-bit RGB: upright, with transparency over white.

    Upright means as its EXIF data or XMP say. CMYK is converted without colour profiles. Raises ValueError if the file
    is not a picture; the message calls it `name`, which is needed for open files only.
    """
    image = _read(picture, name)
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def open_mask(mask: Picture) -> Mask:
    """Returns a mask, or the one in a file.

    If a pixel is transparent, the transparent part is to be generated, as in ComfyUI and editors; else the white part.
    Errors as in `open_picture`.
    """
    image = _read(mask, "")
    if (alpha := _opacity(image)) is not None:
        return Mask(ImageOps.invert(alpha), "alpha")
    return Mask(image.convert("L"), "luminance")


def open_grey(picture: Picture | BinaryIO, name: str = "") -> Image.Image:
    """Returns a picture, or the one in a file, as 8-bit grey. Raises ValueError as `open_picture`, and if it has
    transparent pixels."""
    image = _read(picture, name)
    if _opacity(image) is not None:
        raise ValueError(f"{name or picture} is a mask and has transparent pixels: save it in grey, without them")
    return image.convert("L")


def open_opacity(picture: Picture | BinaryIO, name: str = "") -> Image.Image | None:
    """Returns the opacity of a picture, or of the one in a file, as 8-bit grey; None if no pixel is transparent.

    Errors as in `open_picture`.
    """
    return _opacity(_read(picture, name))


def has_alpha(picture: str | PathLike[str] | BinaryIO, name: str = "") -> bool:
    """True if a picture's header allows for transparent pixels. Raises ValueError if it cannot be read."""
    with opened(picture, name or str(picture)) as file:
        return file.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in file.info


def _opacity(image: Image.Image) -> Image.Image | None:
    alpha = image.getchannel("A") if image.mode == "RGBA" else None
    return None if alpha is None or alpha.getextrema() == (255, 255) else alpha


def check_mask(mask: Image.Image) -> None:
    """Raises ValueError if a grey mask is black or white everywhere, but for traces that no picture shows."""
    low, high = mask.getextrema()
    if high <= TRACE:  # type: ignore[operator]
        raise ValueError("the mask is empty, nothing would change: make the part to generate white, or transparent")
    if low >= 255 - TRACE:  # type: ignore[operator]
        raise ValueError(
            "the mask covers the whole picture, nothing would be kept: use `variations` (image to image), or make the "
            "part to keep black, or opaque"
        )


def picture_size(picture: str | PathLike[str] | BinaryIO, name: str = "") -> tuple[int, int]:
    """Returns the width and height of `open_picture`'s result, for most formats from the header. Errors as there."""
    with opened(picture, name or str(picture)) as file:
        return upright_size(file)


def legal_size(width: int, height: int) -> tuple[int, int]:
    """Returns the legal size nearest to a picture's, which is first scaled down if a side is too long."""
    scale = min(1.0, LARGEST / max(width, height))
    return nearest_legal(round(width * scale)), nearest_legal(round(height * scale))


def read_pixels(picture: Picture, width: int | None = None, height: int | None = None) -> Tensor:
    """Returns a picture as [1, 3, height, width] in [0, 1], scaled to cover this size and cropped around its centre.

    None stands for the legal side nearest to the picture's own.
    """
    image = open_picture(picture)
    nearest = legal_size(*image.size)
    size = nearest[0] if width is None else width, nearest[1] if height is None else height
    check_size(*size)
    return to_pixels(ImageOps.fit(image, size, Image.Resampling.LANCZOS))


def read_batch(pictures: Picture | Sequence[Picture], width: int | None = None, height: int | None = None) -> Tensor:
    """Returns one or several pictures as [B, 3, height, width], see `read_pixels`. ValueError if their sizes differ."""
    several = to_list("picture", pictures, str | PathLike | Image.Image)
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

    Raises ValueError if their sizes differ, or if the mask is empty or covers everything.
    """
    image, grey = open_picture(picture), open_mask(mask).image
    if image.size != grey.size:
        raise ValueError(
            f"the mask is {grey.width}x{grey.height} pixels and the picture {image.width}x{image.height}: give a mask "
            "of the picture's size"
        )
    check_mask(grey)
    mask_pixels = to_pixels(grey)
    if max(image.size) > LARGEST:
        scale = LARGEST / max(image.size)
        width, height = (max(1, round(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.LANCZOS)
        mask_pixels = F.adaptive_max_pool2d(mask_pixels, (height, width))  # keeps thin lines
    return to_pixels(image), mask_pixels


def read_extended(picture: Picture, left: int, top: int, right: int, bottom: int) -> tuple[Tensor, Tensor]:
    """Returns a picture [1, 3, H, W] with borders of repeated edge pixels, and a mask [1, 1, H, W] of the borders.

    Raises ValueError if a border is below 0, all are 0, or a side with its borders exceeds 2048 pixels.
    """
    sides = {"left": left, "right": right, "top": top, "bottom": bottom}
    left, right, top, bottom = pad = tuple(to_int(side, pixels) for side, pixels in sides.items())
    pixels = to_pixels(open_picture(picture))
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


def picture_name(picture: Any) -> str | None:
    """Returns the name of a picture's file without its folder; None if there is no file."""
    path = getattr(picture, "filename", None) if isinstance(picture, Image.Image) else picture
    return Path(path).name if isinstance(path, str | PathLike) and path else None


def _read(picture: Picture | BinaryIO, name: str) -> Image.Image:
    """Returns a picture, or the one in a file, upright in L, RGB or RGBA. ValueError if it cannot be read."""
    if isinstance(picture, Image.Image):
        return to_8_bits(picture, name or getattr(picture, "filename", "") or "the picture")
    if not isinstance(picture, str | PathLike) and not hasattr(picture, "read"):
        raise ValueError(
            f"a picture must be a path or a PIL image, got {type(picture).__name__}: convert arrays with "
            "PIL.Image.fromarray"
        )
    with opened(picture, name := name or str(picture)) as file:
        return to_8_bits(file, name)
