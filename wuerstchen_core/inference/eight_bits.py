"""Converts pictures of every mode of Pillow to 8 bits, or refuses those whose brightness is undefined."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import ExifTags, Image

from .image_files import UnsupportedPicture, upright

SIXTEEN_BITS = 65535


def to_8_bits(image: Image.Image, name: str) -> Image.Image:
    """Returns an image upright in L, RGB or RGBA; it has an alpha channel if it has any transparency.

    ValueError, naming `name`, if the brightness of white is undefined or a transparent colour cannot be applied.
    """
    rawmode = _rawmode(image)
    turned = upright(image)
    key = turned.info.get("transparency")
    if image.mode == "F":
        raise _undefined(name, "floating-point pictures")
    if image.mode.startswith("I"):
        values, white = np.asarray(turned).astype(np.float64), _white(image, turned, name)
        grey = Image.fromarray((values * (255 / white)).round().clip(0, 255).astype(np.uint8))
        if _tag(image, ExifTags.Base.PhotometricInterpretation) == 0:  # white is zero; Pillow inverts 8 bits only
            grey = Image.fromarray(255 - np.asarray(grey))
        return grey if key is None else _without_colour(grey, values == key)
    if key is not None and image.mode in ("1", "L"):
        values = np.asarray(turned.convert("L"))
        scale = {"1": 255 if key else 0, "L;2": 85 * key, "L;4": 17 * key}  # Pillow scales the pixels, but not the key
        return _without_colour(turned.convert("L"), values == scale.get(rawmode or image.mode, key))
    if key is not None and image.mode == "RGB":
        if ";16" in rawmode or max(key) > 255:
            raise UnsupportedPicture(
                f"{name} has 16 bits per channel and a transparent colour, of which only 8 bits can be compared: save "
                "it with an alpha channel"
            )
        return _without_colour(turned, (np.asarray(turned) == key).all(-1))
    if image.mode in ("La", "RGBa"):  # premultiplied
        return turned.convert("LA").convert("RGBA") if image.mode == "La" else turned.convert("RGBA")
    palette = image.mode == "P" and (key is not None or getattr(image.palette, "mode", "").endswith("A"))
    if palette or image.mode in ("LA", "PA", "RGBA"):
        return turned.convert("RGBA")
    if image.mode == "LAB":
        if _tag(image, ExifTags.Base.PlanarConfiguration) == 2:  # whose a and b Pillow reads without their sign
            raise UnsupportedPicture(f"{name} has Lab colours in separate planes: save it as RGB")
        return _lab_to_rgb(turned, name)
    return turned.convert("L" if image.mode in ("1", "L") else "RGB")


def _rawmode(image: Image.Image) -> str:
    """Returns how an image's pixels are stored in its file; "" if they have been read."""
    tiles: Any = getattr(image, "tile", None)
    args = tiles[0][3] if tiles else ""
    return str(args[0] if isinstance(args, tuple) and args else args)


def _tag(image: Image.Image, tag: int) -> Any:
    """Returns a tag of a TIFF file, None for other images."""
    value = getattr(image, "tag_v2", {}).get(tag)
    return value[0] if isinstance(value, tuple) else value


def _white(image: Image.Image, turned: Image.Image, name: str) -> int:
    """Returns the value of white of an integer image."""
    if image.mode != "I":
        return int(2 ** min(16, _tag(image, ExifTags.Base.BitsPerSample) or 16)) - 1
    if image.format in ("PNG", "PPM"):  # the mode of 16 bits in older versions of Pillow
        return SIXTEEN_BITS
    low, high = turned.getextrema()
    if image.format is not None or float(low) < 0 or float(high) > SIXTEEN_BITS:  # type: ignore[arg-type]
        raise _undefined(name, "pictures of 32-bit integers")
    return SIXTEEN_BITS if float(high) > 255 else 255  # type: ignore[arg-type]


def _undefined(name: str, kind: str) -> UnsupportedPicture:
    return UnsupportedPicture(f"{name}: the brightness of white in {kind} is undefined: save it with 8 or 16 bits")


def _without_colour(image: Image.Image, transparent: np.ndarray) -> Image.Image:
    """Returns an opaque image with alpha 0 where `transparent` [H, W] is True."""
    out = image.convert("RGBA")
    out.putalpha(Image.fromarray(np.where(transparent, 0, 255).astype(np.uint8)))
    return out


def _lab_to_rgb(image: Image.Image, name: str) -> Image.Image:
    try:
        return image.convert("RGB")
    except (ImportError, ValueError):  # Pillow without littlecms
        raise UnsupportedPicture(f"{name} has Lab colours, which this Pillow cannot convert: save it as RGB") from None
