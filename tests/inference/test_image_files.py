"""Picture files of all modes and orientations, and errors for unreadable ones."""

from __future__ import annotations

import io
import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from helpers.image_files import noise, png, png_chunk
from PIL import Image

from wuerstchen_core.inference.image_files import image_suffixes
from wuerstchen_core.inference.images import open_mask, open_picture, picture_size, read_pixels

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
    assert open_mask(image).image.mode == "L" and open_mask(image).image.getpixel((1, 1)) == 255


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
    assert np.asarray(open_mask(dark).image)[0].tolist() == [0, 0, 1]
    assert np.asarray(open_mask(plain).image)[0].tolist() == [0, 128, 255]


@pytest.mark.parametrize(("bits", "rows"), [(1, b"\0\x40"), (2, b"\0\x30"), (4, b"\0\x0f"), (8, b"\0\0\xff")])
@pytest.mark.parametrize("white", [True, False])
def test_a_transparent_grey_of_any_depth(bits: int, rows: bytes, white: bool) -> None:
    """Of a black and a white pixel one is transparent, which shows as white in a picture and as a hole in a mask."""
    key = struct.pack(">H", (2**bits - 1) * white)
    file = io.BytesIO(png(2, 1, bits, 0, rows, key))
    assert np.asarray(open_picture(file, "it"))[0, :, 0].tolist() == [0 if white else 255, 255]
    with Image.open(file) as mask:
        assert np.asarray(open_mask(mask).image)[0].tolist() == ([0, 255] if white else [255, 0])


@pytest.mark.parametrize(("bits", "rows"), [(2, b"\0\x70"), (4, b"\0\x5f"), (8, b"\0\x55\xff")])
def test_a_transparent_middle_grey(bits: int, rows: bytes) -> None:
    """Of a grey pixel of a third and a white one, the grey one is transparent."""
    file = io.BytesIO(png(2, 1, bits, 0, rows, struct.pack(">H", (2**bits - 1) // 3)))
    assert np.asarray(open_picture(file, "it"))[0, :, 0].tolist() == [255, 255]
    with Image.open(file) as mask:
        assert np.asarray(open_mask(mask).image)[0].tolist() == [255, 0]


def test_a_transparent_colour() -> None:
    rows, key = b"\0" + bytes([0, 0, 0, 0, 0, 1]), struct.pack(">3H", 0, 0, 0)
    assert np.asarray(open_picture(io.BytesIO(png(2, 1, 8, 2, rows, key)), "it"))[0].tolist() == [[255] * 3, [0, 0, 1]]
    deep = io.BytesIO(png(2, 1, 16, 2, b"\0" + struct.pack(">6H", 0, 0, 0, 0, 0, 9), key))
    with pytest.raises(ValueError, match="^it .*16 bits"):  # Pillow keeps 8 bits, in which both pixels are black
        open_picture(deep, "it")


def test_dark_files_of_sixteen_bits_stay_dark(tmp_path: Path) -> None:
    values = np.array([[0, 128, 255]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "dark.png")
    Image.fromarray(values).save(tmp_path / "dark.tif")
    (tmp_path / "dark.pgm").write_bytes(b"P5 3 1 65535\n" + values.astype(">u2").tobytes())
    for name in ("dark.png", "dark.tif", "dark.pgm"):
        if not name.endswith(".pgm"):
            assert np.asarray(open_picture(tmp_path / name))[0, :, 0].tolist() == [0, 0, 1], name
        with Image.open(tmp_path / name) as image:
            assert open_picture(image).getpixel((2, 0)) == (1, 1, 1), name


def test_tiff_files_of_grey(tmp_path: Path) -> None:
    values = np.array([[0, 257, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "inverted.tif", tiffinfo={262: 0})  # white is zero
    assert np.asarray(open_picture(tmp_path / "inverted.tif"))[0, :, 0].tolist() == [255, 254, 0]
    for name, kind in (("float.tif", np.float32), ("wide.tif", np.int32)):
        Image.fromarray(values.astype(kind)).save(tmp_path / name)
        with pytest.raises(ValueError, match=rf"{name}.*undefined"):
            open_picture(tmp_path / name)


@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
def test_lab(tmp_path: Path, compression: str | None) -> None:
    pytest.importorskip("PIL.ImageCms")
    Image.new("RGB", (4, 4), (200, 30, 30)).convert("LAB").save(tmp_path / "lab.tif", compression=compression)
    for image in (open_picture(tmp_path / "lab.tif"), open_mask(tmp_path / "lab.tif").image.convert("RGB")):
        assert image.mode == "RGB"
    assert np.abs(np.subtract(open_picture(tmp_path / "lab.tif").getpixel((0, 0)), (200, 30, 30))).max() <= 3


@pytest.mark.parametrize(("colour", "channels"), [(2, 3), (6, 4)])
def test_sixteen_bits_of_colour(tmp_path: Path, colour: int, channels: int) -> None:
    pixel = [65535, 32896, 0, 65535][:channels]
    (tmp_path / "deep.png").write_bytes(png(1, 1, 16, colour, b"\0" + struct.pack(f">{channels}H", *pixel)))
    assert open_picture(tmp_path / "deep.png").getpixel((0, 0)) == (255, 128, 0)


def test_transparency_is_white_in_a_picture(tmp_path: Path) -> None:
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert open_picture(clear).getpixel((0, 0)) == (255, 255, 255)
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
    assert open_picture(tmp_path / "turned.jpg").size == (4, 8) == open_mask(tmp_path / "turned.jpg").image.size


# sizes


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "MPO"])
def test_the_size_follows_exif_orientation(kind: str) -> None:
    for orientation in range(1, 9):
        turned, file = Image.Exif(), io.BytesIO()
        turned[274] = orientation
        noise(5, 3).save(file, kind, exif=turned)
        assert picture_size(file, "it") == open_picture(file, "it").size == ((5, 3) if orientation < 5 else (3, 5))


def turned_png(orientation: int, where: str, behind: bool) -> bytes:
    """Returns a PNG file of 5x3 pixels with an orientation in an eXIf, tEXt, zTXt or XMP chunk.

    "APP1" and "xmp" are text chunks of ImageMagick.
    """
    exif = Image.Exif()
    exif[274] = orientation
    profile = f"\nexif\n{len(exif.tobytes()):8}\n{exif.tobytes().hex()}\n".encode()
    xmp = f'<rdf:Description tiff:Orientation="{orientation}"/>'.encode()
    kind, data = {
        "eXIf": (b"eXIf", exif.tobytes()[6:]),
        "tEXt": (b"tEXt", b"Raw profile type exif\0" + profile),
        "zTXt": (b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(profile)),
        "APP1": (b"zTXt", b"Raw profile type APP1\0\0" + zlib.compress(profile.replace(b"exif", b"generic"))),
        "iTXt": (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp),
        "xmp": (b"tEXt", b"Raw profile type xmp\0" + f"\nxmp\n{len(xmp):8}\n{xmp.hex()}\n".encode()),
    }[where]
    chunk = png_chunk(kind, data)
    noise(5, 3).save(file := io.BytesIO(), "PNG")
    plain, at = file.getvalue(), -12 if behind else 33  # behind the header, or before the end chunk
    return plain[:at] + chunk + plain[at:]


@pytest.mark.parametrize("where", ["eXIf", "tEXt", "zTXt", "APP1", "iTXt", "xmp"])
@pytest.mark.parametrize("behind", [False, True])
def test_the_orientation_of_a_png(where: str, behind: bool) -> None:
    flat, turns = np.asarray(noise(5, 3)), {1: 0, 3: 2, 6: 3, 8: 1}  # quarter turns to the left
    for orientation in range(1, 9):
        file = io.BytesIO(turned_png(orientation, where, behind))
        image = open_picture(file, "it")
        assert picture_size(file, "it") == image.size == ((5, 3) if orientation < 5 else (3, 5))
        if orientation in turns:
            assert np.array_equal(np.asarray(image), np.rot90(flat, turns[orientation]))


def with_xmp(kind: str, xmp: bytes) -> io.BytesIO:
    """Returns a picture of 5x3 pixels with XMP."""
    noise(5, 3).save(file := io.BytesIO(), kind, **({"tiffinfo": {700: xmp}} if kind == "TIFF" else {"xmp": xmp}))
    if kind == "JPEG" and xmp not in file.getvalue():  # older versions of Pillow do not write it
        segment = b"http://ns.adobe.com/xap/1.0/\0" + xmp
        plain = file.getvalue()
        file = io.BytesIO(plain[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + plain[2:])
    return file


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "TIFF", "AVIF"])
def test_the_orientation_in_xmp(kind: str) -> None:
    if kind == "AVIF" and ".avif" not in image_suffixes():
        pytest.skip("this Pillow cannot read AVIF")
    for orientation in (1, 3, 6, 7):
        for form in (f'"{orientation}"/>', f"'{orientation}'/>"):
            file = with_xmp(
                kind, f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><d tiff:Orientation={form}</x:xmpmeta>'.encode()
            )
            flat, picture = np.asarray(Image.open(file).convert("RGB")), open_picture(file, "it")
            assert picture_size(file, "it") == picture.size == ((5, 3) if orientation < 5 else (3, 5))
            turned = {1: flat, 3: np.rot90(flat, 2), 6: np.rot90(flat, 3), 7: flat[::-1, ::-1].swapaxes(0, 1)}[
                orientation
            ]
            if kind != "TIFF":  # which Pillow itself turns in newer versions
                assert np.array_equal(np.asarray(picture), turned)


@pytest.mark.parametrize(
    "form",
    [
        'd xmlns:t="http://ns.adobe.com/tiff/1.0/" x:Orientation="3" t:Orientation=" 6 "/>',
        "d><tiff:Orientation>\n6\n</tiff:Orientation></d>",
        'd><tiff:Orientation rdf:datatype="int">6</tiff:Orientation></d>',
        "d><tiff:Orientation><rdf:Seq><rdf:li>6</rdf:li></rdf:Seq></tiff:Orientation></d>",
    ],
)
def test_the_spellings_of_an_orientation_in_xmp(form: str) -> None:
    file = with_xmp("WEBP", f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><{form}</x:xmpmeta>'.encode())
    assert picture_size(file, "it") == open_picture(file, "it").size == (3, 5)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_a_picture_is_turned_once(kind: str) -> None:
    """Also if it was opened or read before."""
    exif, file = Image.Exif(), io.BytesIO()
    exif[274] = 6
    noise(5, 3).save(file, kind, exif=exif, **({"quality": 100} if kind == "JPEG" else {"lossless": True}))
    once = open_picture(file, "it")
    with Image.open(file) as lazy, Image.open(file) as read:
        read.load()
        for picture in (once, lazy, read):
            assert open_picture(picture).size == (3, 5) and open_picture(picture) == once
    if kind != "JPEG":
        assert np.array_equal(np.asarray(once), np.rot90(np.asarray(noise(5, 3)), 3))


@pytest.mark.parametrize("value", [np.zeros((4, 4, 3), np.uint8), None, 3, [Image.new("L", (4, 4))]])
def test_what_is_no_picture(value: object) -> None:
    for read in (open_picture, open_mask, read_pixels):
        with pytest.raises(ValueError, match=type(value).__name__):
            read(value)  # type: ignore[operator]


def test_the_orientation_behind_the_frames_of_an_apng() -> None:
    noise(5, 3).save(file := io.BytesIO(), "PNG", save_all=True, append_images=[Image.new("RGB", (5, 3))])
    exif = Image.Exif()
    exif[274] = 6
    chunk = png_chunk(b"eXIf", exif.tobytes()[6:])
    turned = io.BytesIO(file.getvalue()[:-12] + chunk + file.getvalue()[-12:])
    assert picture_size(turned, "it") == open_picture(turned, "it").size == (3, 5)


def test_every_format_is_read_and_of_one_size() -> None:
    Image.init()
    for kind in {"PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF"} & Image.SAVE.keys():
        noise(32, 16).save(file := io.BytesIO(), kind)
        assert picture_size(file, "it") == open_picture(file, "it").size == (32, 16), kind


@pytest.mark.parametrize("kind", ["PPM", "TGA", "ICO", "PCX", "SGI"])
def test_other_formats_are_not_handed_to_their_decoders(tmp_path: Path, kind: str) -> None:
    noise(32, 16).save(tmp_path / "it.png", kind)
    with pytest.raises(ValueError, match="it.png is not a readable picture"):
        open_picture(tmp_path / "it.png")


def test_the_suffixes_of_pictures() -> None:
    common = {".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".webp", ".bmp", ".tif", ".tiff", ".gif"}
    assert common <= image_suffixes() and not {".pdf", ".eps", ".mpg", ".tga", ".ico", ".npz"} & image_suffixes()


def test_large_pictures_are_scaled_while_they_are_decoded_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wuerstchen_core.inference.image_files.LARGEST_PICTURE", 10_000)
    for kind in ("JPEG", "PNG"):
        noise(160, 80).save(file := io.BytesIO(), kind)
        if kind == "JPEG":
            assert picture_size(file, "it") == open_picture(file, "it").size == (80, 40)
        else:
            with pytest.raises(ValueError, match="^it has"):
                picture_size(file, "it")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_pipes_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "it.png")
    with pytest.raises(ValueError, match="it.png"):
        open_picture(tmp_path / "it.png")


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_lack_of_memory_is_no_damage(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def load(self: Image.Image) -> None:
        raise error

    noise(32, 16).save(file := io.BytesIO(), "PNG")
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    with pytest.raises(type(error)):
        open_picture(file, "it")


def test_the_size_of_a_png_is_known_without_its_pixels() -> None:
    file = io.BytesIO(png(7, 5, 8, 0, bytes(40))[:45])  # the header, and the start of the pixels
    assert picture_size(file, "it") == (7, 5)
    with pytest.raises(ValueError, match="^it .*damaged"):
        open_picture(file, "it")


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0garbage!", b"Exif\0\0II*\0\xff\xff\xff\x7f", b"Exif\0\0", b"II*\0\x08\0\0\0\x05\0"]
)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_picture_whose_exif_data_are_no_exif_data(kind: str, exif: bytes) -> None:
    noise(5, 3).save(file := io.BytesIO(), kind, exif=exif)
    assert picture_size(file, "it") == open_picture(file, "it").size == (5, 3)


def test_other_exif_data_may_be_broken() -> None:
    exif, file = Image.Exif(), io.BytesIO()
    exif[270], exif[274] = "hello", 6
    noise(5, 3).save(file, "JPEG", exif=exif)
    text = b"\x01\x0e\x00\x02"  # the description's tag, and that it is a text
    assert file.getvalue().count(text) == 1
    broken = io.BytesIO(file.getvalue().replace(text, b"\x01\x24\x00\x02"))  # a tag for numbers
    assert picture_size(broken, "it") == open_picture(broken, "it").size == (3, 5)


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
        "empty.png": "not a readable picture", "bomb.png": "100 million", "nowhere.png": "does not exist",
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
