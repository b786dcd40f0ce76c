"""Folders and shards of images: records, images, captions, and the names of what is unreadable."""

from __future__ import annotations

import gzip
import math
import os
import tarfile
from pathlib import Path

import pytest
from helpers.picture_folders import examples, picture, shard, table, write_folder
from PIL import Image

from wuerstchen_core.training.data.folder import FolderSource
from wuerstchen_core.training.data.shards import ShardSource
from wuerstchen_core.training.data.source import ImageSource

SCORED = {"pwatermark": 0.25, "AESTHETIC_SCORE": 5.5, "punsafe": 0.125, "other": [1]}


def local(root: Path, **shards: bytes) -> ShardSource:
    paths = [root / f"{name}.tar" for name in shards]
    for path, content in zip(paths, shards.values(), strict=True):
        path.write_bytes(content)
    return ShardSource(paths, root / "index")


def numbers(source: ImageSource) -> list[int]:
    """Returns the number of each image, which is the red of its pixels."""
    pixels = [source.image(index).getpixel((0, 0)) for index in range(len(source))]
    return [pixel[0] for pixel in pixels if isinstance(pixel, tuple)]


def either(root: Path, kind: str, files: dict[str, bytes]) -> ImageSource:
    return FolderSource([write_folder(root / "pictures", files)]) if kind == "folder" else local(root, a=shard(files))


@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_images_captions_and_scores(tmp_path: Path, kind: str) -> None:
    turned = Image.Exif()
    turned[274] = 6
    files = {
        "in/side/001.jpg": picture(1, 80, 40, "JPEG", exif=turned),
        "in/side/001.txt": b"\xef\xbb\xbf a  red\t apple \r\n\n",
        "in/side/001.json": table(caption="not this", **SCORED),
        "002.WEBP": picture(2, 30, 20, "WEBP", lossless=True),
        "002.json": table(caption=None, TEXT="two", aesthetic="high", punsafe=True, pwatermark=math.nan),
        "003.bmp": picture(3, kind="BMP"),
        "notes.txt": b"no picture",
    }
    source = either(tmp_path, kind, files)
    assert len(source) == 3 and not source.bad
    by_name = {source.names[index].rpartition(":")[2].partition(".")[0]: index for index in range(3)}
    one, two, three = by_name["in/side/001"], by_name["002"], by_name["003"]
    assert source.records[["width", "height"]].tolist()[one] == (40, 80)  # after the rotation in its EXIF data
    assert source.image(one).size == (40, 80)
    assert source.records[["watermark", "aesthetic", "unsafe"]].tolist()[one] == (0.25, 5.5, 0.125)
    assert all(math.isnan(score) for score in source.records[["watermark", "aesthetic", "unsafe"]].tolist()[two])
    assert source.caption(one) == "a red apple" and source.caption(two) == "two"
    assert source.image(two).getpixel((0, 0)) == (2, 100, 200)
    with pytest.raises(ValueError, match="003.* no caption"):
        source.caption(three)


@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_damaged_files_are_named_at_once_or_when_they_are_read(tmp_path: Path, kind: str) -> None:
    cut = picture(2, kind="JPEG")[:-30]
    latin, empty, number = "füße".encode("latin-1"), b" \n", table(caption=5)
    files = {
        "0.png": b"",
        "1.png": b"no picture at all",
        "2.jpg": cut,
        "2.txt": b"cut",
        **{f"{name}.png": picture(3) for name in "345678"},
        "3.txt": latin,
        "4.txt": empty,
        "5.json": number,
        "6.json": b"{broken",
        "7.json": b"1",
        "8.txt": b"fine",
        "9.png": picture(3),
        "9.json": b'{"caption": "a \\ud83d cat"}',
        "10.png": picture(3),
        "10.json": b'{"caption": "ten", "aesthetic": 1' + b"0" * 308 + b"9}",
    }
    source = either(tmp_path, kind, files)
    bad_files = {name.removeprefix("a.tar:").partition(".")[0]: reason for name, reason in source.bad.items()}
    assert sorted(bad_files) == ["0", "1", "10", "6", "7"]
    assert "JSON" in bad_files["6"] and "int" in bad_files["7"] and "aesthetic" in bad_files["10"]
    errors = {}
    for index in range(len(source)):
        name = source.names[index].removeprefix("a.tar:").partition(".")[0]
        try:
            source.image(index), source.caption(index)
        except ValueError as error:
            errors[name] = str(error)
    assert sorted(errors) == ["2", "3", "4", "5", "9"]
    facts = {"2": "damaged", "3": "UTF-8", "4": "no caption", "5": "int", "9": "surrogate"}
    assert all(facts[name] in message for name, message in errors.items())
    for name, message in (bad_files | errors).items():
        assert name in message and "\n" not in message and "BytesIO" not in message


def test_metadata_jsonl_precedes_sidecar_files(tmp_path: Path) -> None:
    rows = [
        table(file_name="1.png", text="one", **SCORED),
        table(file_name="sub/2.png", prompt="two"),
        b"",
        table(file_name="3.png", caption="gone"),
        b"\xff\xfd",
        table(text="of nothing"),
    ]
    files = {"1.png": picture(1), "1.txt": b"not this", "sub/2.png": picture(2), "sub/.hidden.png": picture(9)}
    folder = FolderSource([write_folder(tmp_path, files | {"metadata.jsonl": b"\n".join(rows)})])
    assert folder.names == ["1.png", "sub/2.png"] and [folder.caption(0), folder.caption(1)] == ["one", "two"]
    assert folder.records["aesthetic"][0] == 5.5
    facts = {"metadata.jsonl:4": "3.png", "metadata.jsonl:5": "UTF-8", "metadata.jsonl:6": "file_name"}
    assert folder.bad.keys() == facts.keys()
    assert all(reason.startswith(name) and facts[name] in reason for name, reason in folder.bad.items())


def test_several_folders(tmp_path: Path) -> None:
    one, two = (write_folder(tmp_path / str(n), examples([n]) | {"bad.png": b""}) for n in (5, 4))
    both = FolderSource([one, two])
    assert numbers(both) == [5, 4] and list(both.bad) == [str(one / "bad.png"), str(two / "bad.png")]


def test_an_index_is_used_until_its_shard_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scanned: list[str] = []
    real = tarfile.open

    def counting(*args: object, **options: object) -> tarfile.TarFile:
        scanned.append("")
        return real(*args, **options)  # type: ignore[call-overload, no-any-return]

    one, two, other = (shard(files) for files in (examples([1, 2]), examples([3]) | {"4.png": b""}, examples([7, 8])))
    monkeypatch.setattr(tarfile, "open", counting)
    first = local(tmp_path, a=one, b=two)
    again = ShardSource(first.paths, tmp_path / "index")
    assert len(scanned) == 2 and numbers(again) == numbers(first) == [1, 2, 3]
    assert (again.names, again.bad) == (first.names, first.bad) and list(first.bad) == ["b.tar:4"]
    assert again.records.tobytes() == first.records.tobytes()

    stat = first.paths[0].stat()
    first.paths[0].write_bytes(other)  # of the same size
    assert first.paths[0].stat().st_size == stat.st_size
    os.utime(first.paths[0], ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert numbers(ShardSource(first.paths, tmp_path / "index")) == [7, 8, 3] and len(scanned) == 3

    files = sorted((tmp_path / "index").iterdir())
    assert len(files) == 2 and all(file.suffix == ".npz" for file in files)
    files[0].write_bytes(files[0].read_bytes()[:-100])  # as a full disk can leave it
    files[1].write_bytes(b"")
    assert numbers(ShardSource(first.paths, tmp_path / "index")) == [7, 8, 3] and len(scanned) == 5
    assert numbers(ShardSource(first.paths, tmp_path / "index")) == [7, 8, 3] and len(scanned) == 5


def test_shards_of_one_name_in_two_folders(tmp_path: Path) -> None:
    paths = []
    for number in (1, 2):
        write_folder(tmp_path / str(number), {"a.tar": shard(examples([number]))})
        paths.append(tmp_path / str(number) / "a.tar")
    ShardSource(paths, tmp_path / "index")
    both = ShardSource(paths, tmp_path / "index")
    assert numbers(both) == [1, 2] and both.names == [f"{paths[0]}:001", f"{paths[1]}:002"]


def test_a_shard_is_read_up_to_its_damage(tmp_path: Path) -> None:
    whole = shard(examples([1, 2, 3]))
    member = 512 + 512 * -(-len(picture(1)) // 512)
    example = member + 1024
    for cut, readable, bad in (
        (example, [1], ["the rest"]),  # between two examples
        (example + 600, [1], ["002", "the rest"]),  # within an image
        (example + member + 200, [1, 2], ["the rest"]),  # within the header of a caption, which is lost
        (example + member + 512 + 4, [1], ["002", "the rest"]),  # within a caption
        (3 * example, [1, 2, 3], ["the rest"]),  # before the end mark
        (len(whole), [1, 2, 3], []),
    ):
        source = local(tmp_path, a=whole[:cut])
        assert numbers(source) == readable, cut
        assert sorted(name.removeprefix("a.tar:") for name in source.bad) == bad, cut
    broken = bytearray(whole)
    broken[example] ^= 255  # a byte that the checksum of the header covers
    assert numbers(local(tmp_path, a=bytes(broken))) == [1]


def test_shards_without_images_are_counted(tmp_path: Path) -> None:
    source = local(
        tmp_path,
        empty=b"",
        bare=shard({}),
        texts=shard({"1.txt": b"alone"}),
        packed=gzip.compress(shard(examples([1]))),
        good=shard(examples([2])),
    )
    assert numbers(source) == [2] and not source.bad
    bad = {Path(path).stem: reason for path, reason in source.bad_shards.items()}
    assert sorted(bad) == ["bare", "empty", "packed", "texts"]
    assert all(f"{name}.tar" in reason for name, reason in bad.items())
    assert "uncompressed" in bad["packed"] and "no readable image" in bad["bare"]


def test_a_long_image_header(tmp_path: Path) -> None:
    long = picture(1, 96, 64, "JPEG", comment=b"x" * 60000, exif=b"Exif\0\0" + b"x" * 60000)
    source = local(tmp_path, a=shard({"1.jpg": long}))
    assert source.records[["width", "height"]].tolist() == [(96, 64)]
