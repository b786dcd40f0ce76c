"""Pictures and masks of all kinds as tensors, and errors for unreadable files."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.golden_data import assert_near
from PIL import Image
from torchvision import transforms

from wuerstchen_core.inference.images import (
    legal_size,
    open_mask,
    open_picture,
    pad_to_legal,
    picture_size,
    read_batch,
    read_extended,
    read_masked,
    read_pixels,
    to_pictures,
    to_pixels,
)
from wuerstchen_core.models.image_encoder import IMAGENET_MEAN, IMAGENET_STD, semantic_view


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    channels = {"RGB": (3,), "RGBA": (4,), "CMYK": (4,), "L": ()}[mode]
    values = np.random.default_rng(0).integers(0, 256, (height, width, *channels), dtype=np.uint8)
    return Image.frombytes(mode, (width, height), values.tobytes())


def png(width: int, height: int, bits: int, colour: int, rows: bytes) -> bytes:
    """Returns a PNG file written by hand: Pillow cannot write colour with 16 bits per channel."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


# modes


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "I", "I;16"]
)
def test_every_mode_is_read(mode: str) -> None:
    grey = Image.new("L", (3, 2), 255)
    image = Image.new("I;16", (3, 2), 65535) if mode == "I;16" else grey.convert("RGB").convert(mode)
    if mode in ("PA", "I"):
        image = grey.convert("P" if mode == "PA" else "L").convert(mode)
    assert open_picture(image).mode == "RGB" and open_picture(image).getpixel((1, 1)) == (255, 255, 255)
    assert open_mask(image).mode == "L" and open_mask(image).getpixel((1, 1)) == 255


@pytest.mark.parametrize("where", ["memory", "file"])
def test_sixteen_bits_of_grey_are_not_clipped(tmp_path: Path, where: str) -> None:
    values = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    image = Image.fromarray(values)
    if where == "file":
        image.save(tmp_path / "grey.png")
        with Image.open(tmp_path / "grey.png") as file:
            assert file.mode.startswith("I")
    opened = open_picture(tmp_path / "grey.png" if where == "file" else image)
    assert np.asarray(opened)[0].tolist() == [[value] * 3 for value in (0, 1, 128, 255)]
    older = Image.fromarray(values.astype(np.int32))  # the mode that older versions of Pillow give it
    assert older.mode == "I" and open_picture(older).getpixel((2, 0)) == (128, 128, 128)


def test_dark_grey_of_sixteen_bits_stays_dark() -> None:
    """Values up to 255 are 16-bit ones in mode I;16, and taken as 8-bit ones in mode I."""
    values = np.array([[0, 128, 255]], dtype=np.uint16)
    dark, plain = Image.fromarray(values), Image.fromarray(values.astype(np.int32))
    assert (dark.mode, plain.mode) == ("I;16", "I")
    assert np.asarray(open_mask(dark))[0].tolist() == [0, 0, 1]
    assert np.asarray(open_mask(plain))[0].tolist() == [0, 128, 255]


@pytest.mark.parametrize(("colour", "channels"), [(2, 3), (6, 4)])
def test_sixteen_bits_of_colour(tmp_path: Path, colour: int, channels: int) -> None:
    pixel = [65535, 32896, 0, 65535][:channels]
    (tmp_path / "deep.png").write_bytes(png(1, 1, 16, colour, b"\0" + struct.pack(f">{channels}H", *pixel)))
    assert open_picture(tmp_path / "deep.png").getpixel((0, 0)) == (255, 128, 0)


def test_transparency_is_white_in_a_picture_and_kept_in_a_mask(tmp_path: Path) -> None:
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert open_picture(clear).getpixel((0, 0)) == (255, 255, 255)
    assert open_mask(Image.new("RGBA", (4, 4), (255, 255, 255, 0))).getpixel((0, 0)) == 0
    half = Image.new("RGBA", (4, 4), (0, 0, 0, 128))
    assert open_picture(half).getpixel((0, 0)) == (127, 127, 127)
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "palette.gif", transparency=0)
    opened = open_picture(tmp_path / "palette.gif")
    assert opened.getpixel((0, 0)) == (255, 255, 255) and opened.getpixel((1, 0)) == (0, 0, 255)


def test_cmyk(tmp_path: Path) -> None:
    Image.new("CMYK", (64, 64), (0, 255, 255, 0)).save(tmp_path / "print.jpg")
    red, green, blue = open_picture(tmp_path / "print.jpg").getpixel((5, 5))  # type: ignore[misc]
    assert red > 250 and green < 5 and blue < 5


def test_exif_orientation(tmp_path: Path) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (8, 4), "red").save(tmp_path / "turned.jpg", exif=turned)
    assert open_picture(tmp_path / "turned.jpg").size == (4, 8) == open_mask(tmp_path / "turned.jpg").size


# sizes


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_the_size_follows_exif_orientation(kind: str) -> None:
    for orientation in range(1, 9):
        turned, file = Image.Exif(), io.BytesIO()
        turned[274] = orientation
        noise(5, 3).save(file, kind, exif=turned)
        assert picture_size(file, "it") == open_picture(file, "it").size == ((5, 3) if orientation < 5 else (3, 5))


def test_the_size_of_a_png_is_known_without_its_pixels() -> None:
    file = io.BytesIO(png(7, 5, 8, 0, bytes(40))[:45])  # the header, and the start of the pixels
    assert picture_size(file, "it") == (7, 5)
    with pytest.raises(ValueError, match="^it .*damaged"):
        open_picture(file, "it")


def test_broken_exif_data_are_damage() -> None:
    exif, file = Image.Exif(), io.BytesIO()
    exif[270], exif[274] = "hello", 6
    noise(5, 3).save(file, "JPEG", exif=exif)
    text = b"\x01\x0e\x00\x02"  # the description's tag, and that it is a text
    assert file.getvalue().count(text) == 1
    broken = io.BytesIO(file.getvalue().replace(text, b"\x01\x24\x00\x02"))  # a tag for numbers
    with pytest.raises(ValueError, match="^it .*damaged"):
        open_picture(broken, "it")


@pytest.mark.parametrize(
    ("own", "legal"),
    [
        ((256, 256), (256, 256)), ((250, 300), (256, 320)), ((4096, 1024), (2048, 512)), ((30, 100), (64, 128)),
        ((1, 1), (64, 64)), ((20_000, 1_000), (2048, 128)), ((20_000, 1), (2048, 64)), ((1, 20_000), (64, 2048)),
    ],
)  # fmt: skip
def test_every_size_has_a_legal_one(own: tuple[int, int], legal: tuple[int, int]) -> None:
    assert legal_size(*own) == legal
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuple(read_pixels(Image.new("RGB", own, "red")).shape) == (1, 3, legal[1], legal[0])


def test_a_picture_covers_and_is_cropped_around_its_centre() -> None:
    banner = Image.new("RGB", (300, 100), "red")
    banner.paste("blue", (100, 0, 200, 100))
    blue = torch.tensor([0.0, 0.0, 1.0]).view(1, 3, 1, 1)
    assert (read_pixels(banner, 64, 64) - blue).abs().max() < 0.05  # the filter reaches over the edge
    exact = noise(128, 64)
    assert torch.equal(read_pixels(exact), to_pixels(exact)) and to_pictures(to_pixels(exact))[0] == exact


def test_a_batch_has_one_size() -> None:
    assert read_batch([noise(64, 64), noise(60, 70)]).shape == (2, 3, 64, 64)
    assert read_batch([noise(64, 64), noise(128, 64)], 64, 64).shape == (2, 3, 64, 64)
    with pytest.raises(ValueError, match="128x64 and 64x64"):
        read_batch([noise(64, 64), noise(128, 64)])
    with pytest.raises(ValueError, match="no picture"):
        read_batch([])


def test_a_canvas_repeats_its_edges() -> None:
    pixels = torch.rand(1, 3, 70, 64)
    canvas = pad_to_legal(pixels)
    assert canvas.shape == (1, 3, 128, 64) and torch.equal(canvas[..., :70, :], pixels)
    assert torch.equal(canvas[..., 70:, :], pixels[..., -1:, :].expand(1, 3, 58, 64))


# the encoder's view


@pytest.mark.parametrize("size", [(512, 512), (1024, 1024), (256, 256), (256, 384), (640, 256)])
def test_the_semantic_view_is_the_originals(size: tuple[int, int]) -> None:
    """torchvision's Resize to 3/4 (384 for 512), CenterCrop and Normalize, as the original composes them."""
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    view = tuple(side * 3 // 4 for side in size)
    original = transforms.Compose(
        [
            transforms.Resize(min(view), interpolation=transforms.InterpolationMode.BILINEAR, antialias=True),
            transforms.CenterCrop(view),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )
    assert_near(semantic_view(images), original(images), 1e-5)


# masks


def test_a_mask_of_the_pictures_size() -> None:
    picture, mask = noise(100, 50), Image.new("1", (100, 50))
    mask.paste(1, (10, 10, 20, 20))
    pixels, mask_pixels = read_masked(picture, mask)
    assert pixels.shape == (1, 3, 50, 100) and mask_pixels.shape == (1, 1, 50, 100)
    assert to_pictures(pixels)[0] == picture and mask_pixels.sum() == 100
    with pytest.raises(ValueError, match="50x100 .*100x50"):
        read_masked(picture, Image.new("L", (50, 100), 255))


def test_an_empty_mask() -> None:
    with pytest.raises(ValueError, match="mask is empty"):
        read_masked(noise(64, 64), Image.new("L", (64, 64)))


def test_a_thin_line_of_a_mask_survives_the_scaling_down() -> None:
    picture, mask = Image.new("RGB", (5000, 40)), Image.new("L", (5000, 40))
    mask.paste(255, (2500, 0, 2501, 40))
    pixels, mask_pixels = read_masked(picture, mask)
    assert pixels.shape[-2:] == mask_pixels.shape[-2:] == (16, 2048)
    assert mask_pixels.amax(dim=-1).min() == 1 and mask_pixels.mean() < 0.01


def test_a_strip_keeps_a_row_when_it_is_scaled_down() -> None:
    pixels, _ = read_masked(Image.new("RGB", (5000, 1)), Image.new("L", (5000, 1), 255))
    assert pixels.shape[-2:] == (1, 2048)


def test_a_large_picture_and_its_mask_are_scaled_down_alike() -> None:
    pixels, mask_pixels = read_masked(Image.new("RGB", (4096, 1000), "red"), Image.new("L", (4096, 1000), 255))
    assert pixels.shape == (1, 3, 500, 2048) and mask_pixels.shape == (1, 1, 500, 2048)


def test_borders_are_masked() -> None:
    wide, mask = read_extended(noise(64, 64), 10, 0, 5, 20)
    assert wide.shape == (1, 3, 84, 79) and torch.equal(wide[..., :64, 10:74], to_pixels(noise(64, 64)))
    assert not mask[..., :64, 10:74].any() and mask.sum() == 84 * 79 - 64 * 64


@pytest.mark.parametrize(
    ("borders", "message"),
    [((0, 0, 0, 0), "0, 0, 0 and 0"), ((-1, 5, 0, 0), "-1"), ((0, 0, 2000, 0), "2064x64")],
)
def test_invalid_borders(borders: tuple[int, int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_extended(noise(64, 64), *borders)


# files that are not pictures


def test_unreadable_files(tmp_path: Path) -> None:
    whole = io.BytesIO()
    noise(64, 64).save(whole, "PNG")
    broken = bytearray(whole.getvalue())
    broken[2000] ^= 0xFF
    (tmp_path / "cut.png").write_bytes(whole.getvalue()[:3000])
    (tmp_path / "broken.png").write_bytes(broken)
    (tmp_path / "text.png").write_text("version https://git-lfs.example/spec/v1")
    (tmp_path / "empty.png").touch()
    # 20,000 x 20,000 pixels of nothing are a small file: the size stands in its first bytes.
    (tmp_path / "bomb.png").write_bytes(png(20_000, 20_000, 1, 0, zlib.compress(b"")))
    wrong = {
        "cut.png": "damaged", "broken.png": "damaged", "text.png": "not a readable picture",
        "empty.png": "not a readable picture", "bomb.png": "178 million", "nowhere.png": "does not exist",
        ".": "not a readable picture",
    }  # fmt: skip
    for name, words in wrong.items():
        for read in (open_picture, open_mask):
            with pytest.raises(ValueError, match=words) as caught:
                read(tmp_path / name)
            message = str(caught.value)
            assert str(tmp_path) in message and "\n" not in message and len(message) - len(str(tmp_path)) < 300
    with pytest.raises(ValueError, match="floating-point"):
        open_picture(Image.new("F", (4, 4), 0.5))


def test_a_large_panorama_is_read_without_a_warning(tmp_path: Path) -> None:
    (tmp_path / "wide.png").write_bytes(png(20_000, 5_000, 1, 0, (b"\0" + b"\xff" * 2500) * 5_000))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_pixels(tmp_path / "wide.png").shape == (1, 3, 512, 2048)
