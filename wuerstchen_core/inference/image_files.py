"""Image files: their endings, opening them, and the orientation that their metadata give."""

from __future__ import annotations

import math
import re
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import cache
from importlib import import_module
from io import BytesIO
from os import PathLike
from typing import IO, Any, BinaryIO

from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from ..common.files import check_file
from ..common.memory import is_out_of_memory

PLUGINS = ("pillow_heif", "pillow_avif", "pillow_jxl")  # packages that add formats to Pillow
# Pillow's names of the formats that are read, if it or a plugin has them. The decoders of others are hardly tested.
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "HEIF", "JXL")
# Formats whose header gives the size of the loaded image; plugins may turn it in others.
SIZE_IN_HEADER = set(FORMATS) - {"JXL"}
LARGEST_PICTURE = 100_000_000  # pixels; reading one takes 18 bytes for each
LARGE_PICTURE = 30_000_000  # pixels, above which the workers of a training read one picture at a time
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # by the value of EXIF's orientation
XMP_HEADER = b"http://ns.adobe.com/xap/1.0/"  # of a JPEG's segment
TIFF_PREFIX = re.compile(rb"""xmlns:([\w-]+)\s*=\s*["']http://ns\.adobe\.com/tiff/1\.0/["']""")
XMP_VALUE = rb""":Orientation\s*(?:=\s*["']|[^>=]*>|\s[^>]*>)\s*(?:<rdf:\w+>\s*)*([1-8])\b"""
PNG_PIXELS = (b"IDAT", b"fcTL", b"fdAT")


_turns: AbstractContextManager[Any] = nullcontext()


class UnsupportedPicture(ValueError):
    """An intact picture of a kind that cannot be read correctly."""


def take_turns(lock: AbstractContextManager[Any]) -> None:
    """Makes this process read large pictures only while it has a reentrant lock, which other processes share."""
    global _turns
    _turns = lock


def turn(pixels: int) -> AbstractContextManager[Any]:
    """Returns the context in which to read a picture of so many pixels, which is the lock for a large one."""
    return _turns if pixels > LARGE_PICTURE else nullcontext()


@cache
def image_suffixes() -> frozenset[str]:
    """Returns the suffixes, such as ".png", of the FORMATS that the installed Pillow and its plugins read."""
    Image.init()
    for name in PLUGINS:
        try:
            plugin = import_module(name)
        except (ImportError, OSError):  # not installed, or without its library
            continue
        getattr(plugin, "register_heif_opener", lambda: None)()
    readable = {*_readable(), "MPO"}  # opened as JPEG
    return frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in readable)


def _readable() -> list[str]:
    """Returns the FORMATS that can be opened."""
    return [kind for kind in FORMATS if kind in Image.OPEN]


@contextmanager
def opened(picture: str | PathLike[str] | BinaryIO, name: str) -> Iterator[Image.Image]:
    """Opens a picture's file with Pillow. Errors inside the block become a ValueError that names the file.

    JPEG files of more than LARGEST_PICTURE pixels are scaled down while they are decoded; others are refused.
    """
    image_suffixes()  # loads the plugins
    if isinstance(picture, str | PathLike):
        check_file(picture)
    try:
        with warnings.catch_warnings():  # Pillow warns above 89 million pixels and raises above twice as many
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with _open(picture) as file:
                _limit_size(file, name)
                with turn(file.width * file.height):
                    yield file
    except FileNotFoundError:
        raise ValueError(f"{name} does not exist: check the path") from None
    except Image.DecompressionBombError:
        limit = LARGEST_PICTURE // 1_000_000
        raise ValueError(f"{name} has more than {limit} million pixels: scale it down first") from None
    except (UnidentifiedImageError, IsADirectoryError):
        raise ValueError(f"{name} is not a readable picture: give a PNG, JPEG or WebP file") from None
    except UnsupportedPicture:
        raise
    except Exception as error:  # of broken pixels or EXIF; each decoder has its own
        if is_out_of_memory(error):
            raise
        raise ValueError(f"{name} is truncated or damaged ({error}): save it again") from error


def _open(picture: str | PathLike[str] | BinaryIO) -> Image.Image:
    """Opens a picture's file. Pillow refuses more than 178 million pixels, which `_limit_size` scales down in JPEG."""
    try:
        return Image.open(picture, formats=_readable())
    except Image.DecompressionBombError:
        if not isinstance(picture, str | PathLike):
            picture.seek(0)
        from PIL.JpegImagePlugin import JpegImageFile  # ComfyUI has not imported it when it starts

        with suppress(SyntaxError):  # it is no JPEG file
            return JpegImageFile(picture)
        raise


def _limit_size(file: Image.Image, name: str) -> None:
    width, height = file.size
    if width * height <= LARGEST_PICTURE:
        return
    scale = (LARGEST_PICTURE / width / height) ** 0.5
    file.draft(file.mode, (math.ceil(width * scale / 2), math.ceil(height * scale / 2)))  # chooses 1/2, 1/4 or 1/8
    if file.width * file.height > LARGEST_PICTURE:
        raise UnsupportedPicture(
            f"{name} has {width * height // 1_000_000} million pixels, more than {LARGEST_PICTURE // 1_000_000}: scale "
            "it down first"
        )


def upright(image: Image.Image) -> Image.Image:
    """Returns a copy of an image, turned as its metadata say, without them."""
    orientation = _orientation(image)
    if image.format == "TIFF" and _exif_orientation(image) is not None:
        orientation = 1  # Pillow turns the pixels of these when it reads them
    turn = TURNS.get(orientation)
    out = image.copy() if turn is None else image.transpose(turn)
    out.info = {key: value for key, value in out.info.items() if key == "transparency"}
    return out


def upright_size(file: Image.Image) -> tuple[int, int]:
    """Returns the width and height of `upright(file)`, for most formats without reading the pixels."""
    if file.format not in SIZE_IN_HEADER:
        return upright(file).size
    width, height = file.size
    if file.format == "TIFF":  # newer versions of Pillow turn its size by themselves
        tags = file.tag_v2  # type: ignore[attr-defined]
        width, height = (int(tags[tag]) for tag in (ExifTags.Base.ImageWidth, ExifTags.Base.ImageLength))
    return (height, width) if _orientation(file) >= 5 else (width, height)  # those are turned by 90 degrees


def _orientation(file: Image.Image) -> int:
    """Returns the orientation of an image by EXIF, 1 to 8, from EXIF data, else XMP.

    Chunks behind the pixels of a PNG file count too; Pillow itself finds them only by decoding it.
    """
    header = file
    if isinstance(file, ImageFile.ImageFile) and file.format == "PNG" and file.tile and file.fp is not None:
        position = file.fp.tell()
        try:
            header = Image.open(_without_pixels(file.fp), formats=["PNG"])
        finally:
            file.fp.seek(position)
    found = _exif_orientation(header)
    if found is None:
        xmp = _xmp(header)
        prefix = TIFF_PREFIX.search(xmp)
        match = re.search((prefix[1] if prefix else b"tiff") + XMP_VALUE, xmp)
        found = int(match[1]) if match else None
    return found if found in TURNS else 1


def _exif_orientation(image: Image.Image) -> int | None:
    try:
        # The base class's method: PNG's own decodes the pixels.
        exif = Image.Image.getexif(image)
        if not exif and (raw := _raw_profile(image, "APP1")).startswith(b"Exif\0\0"):
            exif = Image.Exif()
            exif.load(raw)
        return exif.get(ExifTags.Base.Orientation)
    except (SyntaxError, TypeError, ValueError, struct.error):  # no EXIF data after all; the pixels are intact
        return None


def _xmp(image: Image.Image) -> bytes:
    """Returns the XMP of an image; older versions of Pillow do not put it into `info`."""
    info, tags = image.info, getattr(image, "tag_v2", {})
    apps = [data for name, data in getattr(image, "applist", []) if name == "APP1" and data.startswith(XMP_HEADER)]
    found = info.get("XML:com.adobe.xmp") or info.get("xmp") or (apps[0] if apps else None)
    found = found or _raw_profile(image, "xmp") or _raw_profile(image, "APP1")
    if "xmp" not in info and not found:
        found = tags.get(ExifTags.Base.XMLPacket, b"")
    return found.encode(errors="replace") if isinstance(found, str) else bytes(found)


def _raw_profile(image: Image.Image, kind: str) -> bytes:
    """Returns the bytes of a text chunk in which ImageMagick stores metadata of a kind, in hexadecimal digits."""
    text = image.info.get(f"Raw profile type {kind}", "")
    try:
        return bytes.fromhex("".join(text.split()[2:]))  # behind the kind and the number of bytes
    except (AttributeError, ValueError):
        return b""


def _without_pixels(file: IO[bytes]) -> BytesIO:
    """Returns a PNG file whose chunks all come before its pixels, which are empty."""
    file.seek(0)
    kept = [file.read(8)]
    while len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        if kind in PNG_PIXELS:
            file.seek(length + 4, 1)
        elif len(data := file.read(length + 4)) == length + 4 and kind != b"IEND":
            kept += [head, data]
        else:
            break
    return BytesIO(b"".join(kept) + struct.pack(">I4sI", 0, b"IDAT", zlib.crc32(b"IDAT")))
