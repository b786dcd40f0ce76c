"""Files that are examples, and files that are not: endings, dots, links, masks, archives and companions from a Mac."""

from __future__ import annotations

import gzip
import io
import itertools
import logging
import lzma
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest
from helpers.picture_folders import examples, picture, shard, table, write_folder
from PIL import Image

from wuerstchen_core.common.dataclass_config import from_table
from wuerstchen_core.inference.image_files import image_suffixes
from wuerstchen_core.training.data.filters import ImageDataConfig
from wuerstchen_core.training.data.folder import FolderSource
from wuerstchen_core.training.data.loading import BatchLoader, IndexedLoader
from wuerstchen_core.training.data.open import open_loader
from wuerstchen_core.training.data.shards import ShardSource
from wuerstchen_core.training.data.source import ImageSource

KINDS = ["folder", "shards", "stream"]


def loader(source: str, cache: Path, **options: Any) -> BatchLoader:
    data = {"source": source, "buckets": [[64, 64]], "workers": 0, "allow_pipe": True, "bad_share": 0.9}
    return open_loader(from_table(ImageDataConfig, data, "data"), batch=1, seed=0, cache=cache, **options)


def source_of(root: Path, kind: str, files: dict[str, bytes]) -> str:
    """Returns the name of a source with some files."""
    if kind == "folder":
        return str(write_folder(root / "pictures", files))
    (root / "a.tar").write_bytes(shard(files))
    return str(root / "a.tar") if kind == "shards" else f"pipe:cat {root}/a.tar"


def read(opened: BatchLoader, count: int) -> list[tuple[int, str]]:
    """Returns number and caption of `count` examples, sorted: all of them, if there are so many."""
    batches = itertools.islice(opened.batches(), count)
    return sorted((int(batch.images[0, 0, 0, 0]), batch.captions[0]) for batch in batches)


def names_and_captions(source: ImageSource) -> dict[str, str]:
    return {name: source.caption(index) for index, name in enumerate(source.names)}


def skip_without(kind: str) -> None:
    if kind == "stream":
        pytest.importorskip("webdataset")


@pytest.mark.parametrize("kind", KINDS)
def test_every_ending_of_the_formats(tmp_path: Path, kind: str) -> None:
    skip_without(kind)
    files, number = {}, 0
    several = {".jfif", ".jpe", ".apng", ".avif", ".bmp", ".gif", ".tiff", ".webp", ".dib"}
    for suffix in sorted(image_suffixes() & several):
        if Image.registered_extensions()[suffix] not in Image.SAVE:
            continue
        number += 20
        file = io.BytesIO()
        options: dict[str, Any] = {"quality": 100} if suffix in (".jfif", ".jpe", ".avif", ".webp") else {}
        Image.new("RGB", (64, 64), (number, 100, 200)).save(file, Image.registered_extensions()[suffix], **options)
        name = f"{number}{suffix if number % 40 else suffix.upper()}"
        files |= {name: file.getvalue(), f"{number}.TXT" if number % 60 else f"{number}.txt": str(number).encode()}
    found = read(loader(source_of(tmp_path, kind, files), tmp_path), number // 20)
    assert number >= 120 and [text for _, text in found] == sorted(map(str, range(20, number + 1, 20)), key=int)
    assert all(abs(red - int(text)) <= 3 for red, text in found)


@pytest.mark.parametrize("kind", ["shards", "stream"])
def test_names_with_dots_in_shards(tmp_path: Path, kind: str) -> None:
    skip_without(kind)
    files = {
        "a.jpg": picture(1, kind="JPEG", quality=100), "a.txt": b"one",
        "b 2.v1.PNG": picture(2), "b 2.v1.txt": b"two", "b 2.v2.png": picture(3), "b 2.V2.TXT": b"three",
        "x/0003.image.png": picture(4), "x/0003.caption.txt": b"four", "x/0003.mask.png": picture(99),
        "v1.0/c.png": picture(5), "v1.0/c.json": table(caption="five"),
        "d.1.2.webp": picture(6, kind="WEBP", lossless=True), "d.1.2.caption": b"six",
        "e.png": picture(7), "e.depth.png": picture(98), "e.txt": b"seven", "e.npz": b"", "e.cls": b"3",
        "f.left.png": picture(8), "f.right.png": picture(9), "f.txt": b"both",
    }  # fmt: skip
    opened = loader(source_of(tmp_path, kind, files), tmp_path)
    texts = ["one", "two", "three", "four", "five", "six", "seven", "both", "both"]
    assert read(opened, 9) == [(number, text) for number, text in enumerate(texts, 1)]
    if isinstance(opened, IndexedLoader):
        left_out = opened.source.left_out
        assert left_out["masks and conditioning images"] == 2 and left_out[".npz files"] == left_out[".cls files"] == 1
        assert [name.removeprefix("a.tar:") for name in opened.source.names[:3]] == ["a", "b 2.v1", "b 2.v2"]


def mac(files: dict[str, bytes]) -> dict[str, bytes]:
    """Returns the members of a tar file made on a Mac: each is preceded by a hidden companion."""
    out: dict[str, bytes] = {".DS_Store": b"\0", "./._cats": b"\0"}
    for name, content in files.items():
        folder, _, base = name.rpartition("/")
        out |= {f"{folder}/._{base}": b"\0\5\x16\7", f"PaxHeader/{base}": b"30 mtime=1\n", name: content}
        out[f"@eaDir/{base}/THUMB.png"] = b"thumbnail"
        out[f"__MACOSX/{folder}/._{base}"] = b"\0\5\x16\7"
    return out


@pytest.mark.parametrize("kind", ["shards", "stream"])
def test_tar_files_from_a_mac(tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    skip_without(kind)
    caplog.set_level(logging.INFO)
    files = mac({f"./cats/{name}": content for name, content in examples([1, 2, 3]).items()})
    opened = loader(source_of(tmp_path, kind, files), tmp_path)
    assert read(opened, 3) == [(n, f"picture {n}") for n in (1, 2, 3)]
    assert "hidden files" in caplog.text
    if kind == "shards":
        assert "left out: 26 hidden files: a.tar:.DS_Store" in caplog.text


@pytest.mark.parametrize("kind", ["shards", "stream"])
@pytest.mark.parametrize("padding", [0, 512, 10240 + 100])
def test_tar_files_one_after_another(tmp_path: Path, kind: str, padding: int) -> None:
    """All are read, and equal keys in two archives are two examples."""
    skip_without(kind)
    one, two = shard(examples([1, 2])), shard({"001.png": picture(5), "001.txt": b"five"})
    other = shard(examples([3]))[:-1024].rstrip(b"\0")  # an archive whose end mark is cut is read up to there
    (tmp_path / "a.tar").write_bytes(one + bytes(512 * (padding // 512)) + two + other + bytes(padding % 512))
    opened = loader(source_of_existing(tmp_path, kind), tmp_path)
    assert read(opened, 4) == [(1, "picture 1"), (2, "picture 2"), (3, "picture 3"), (5, "five")]
    if isinstance(opened, IndexedLoader):
        assert [name.removeprefix("a.tar:") for name in opened.source.names][:3] == ["001", "002", "001 (archive 2)"]


def source_of_existing(root: Path, kind: str) -> str:
    return str(root / "a.tar") if kind == "shards" else f"pipe:cat {root}/a.tar"


@pytest.mark.parametrize("compress", [gzip.compress, lzma.compress])
def test_compressed_streams_one_after_another(tmp_path: Path, compress: Any) -> None:
    pytest.importorskip("webdataset")
    (tmp_path / "a.tar").write_bytes(compress(shard(examples([1]))) + compress(shard(examples([2]))))
    assert read(loader(f"pipe:cat {tmp_path}/a.tar", tmp_path), 2) == [(1, "picture 1"), (2, "picture 2")]


def test_a_tar_file_with_links_and_replaced_members(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, content in [*examples([1]).items(), ("001.txt", b"newer")]:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        for kind in (tarfile.LNKTYPE, tarfile.SYMTYPE):
            member = tarfile.TarInfo(f"2{kind!r}.png")
            member.type, member.linkname = kind, "001.png"
            tar.addfile(member)
    source = ShardSource([tmp_path / "a.tar"], tmp_path)
    assert names_and_captions(source) == {"a.tar:001": "newer"}
    assert source.left_out["links and sparse files"] == 2
    assert source.left_out["members that a later one of their name replaces"] == 1
    again = ShardSource([tmp_path / "a.tar"], tmp_path)  # from its index
    assert again.left_out.to_json() == source.left_out.to_json()


def test_links_are_followed_once(tmp_path: Path) -> None:
    store, root = write_folder(tmp_path / "store", examples([1, 2])), write_folder(tmp_path / "in", examples([3]))
    write_folder(root / "own", examples([4]))
    os.symlink(store, root / "a cats")
    os.symlink(root, root / "own" / "loop")
    os.symlink(root / "own", root / "again")
    os.symlink(store / "001.png", root / "one.png")
    os.symlink(store / "001.txt", root / "one.txt")
    os.symlink("nowhere.png", root / "broken.png")
    source = FolderSource([root])
    assert sorted(source.names) == ["003.png", "a cats/001.png", "a cats/002.png", "one.png", "own/004.png"]
    assert source.caption(source.names.index("one.png")) == "picture 1"
    assert source.left_out["links to folders that are read already"] == 2
    assert source.left_out["broken links and devices"] == 1


def test_masks_beside_images_are_left_out(tmp_path: Path) -> None:
    files = examples([1, 2])
    masks = ["001-masklabel.png", "001-condlabel.png", "001_mask.PNG", "001.mask.png", "002-mask.jpg", "002_masks.webp"]
    masks += ["003-masklabel.png", "masks/001.png", "conditioning/002.jpg", "conditioning_images/002.png"]
    files |= {name: b"not even an image" for name in masks}
    files |= {
        "tiger_mask.png": picture(3),
        "tiger_mask.txt": b"a tiger mask",
        "tiger.png": picture(4),
        "tiger.txt": b"x",
    }
    files |= {"carnival mask.png": picture(5), "carnival mask.txt": b"a mask", "masks/venice.png": picture(6)}
    source = FolderSource([write_folder(tmp_path, files)])
    names = ["001.png", "002.png", "carnival mask.png", "masks/venice.png", "tiger.png", "tiger_mask.png"]
    assert source.names == names and not source.bad
    assert source.left_out["masks and conditioning images"] == len(masks)


def test_masks_of_other_names_and_places_are_left_out(tmp_path: Path) -> None:
    """Also with captions, for OneTrainer's; numbered, with the image's ending, in folders beside the images'."""
    files = {"cat/a.png": picture(1), "cat/b.jpg": picture(2, kind="JPEG", quality=100), "c/d_control.png": picture(3)}
    masks = ["cat/a-masklabel.png", "cat/a_mask-0.png", "cat/a mask2.png", "cat/mask_b.png", "cat/a_alpha.webp"]
    masks += ["cat_mask/a.png", "masks/cat/a.png", "masks/b_mask.png", "cat/masks/b.jpg.png"]
    files |= {name: b"not even an image" for name in masks} | {"cat/a-masklabel.txt": b"a white shape"}
    folder = FolderSource([write_folder(tmp_path / "in", files)])
    (tmp_path / "a.tar").write_bytes(shard(files))
    packed = ShardSource([tmp_path / "a.tar"], tmp_path)
    assert sorted(folder.names) == ["c/d_control.png", "cat/a.png", "cat/b.jpg"] and not folder.bad
    assert sorted(packed.names) == ["a.tar:c/d_control", "a.tar:cat/a", "a.tar:cat/b"] and not packed.bad
    for source in (folder, packed):
        assert source.left_out["masks and conditioning images"] == len(masks)


@pytest.mark.parametrize("kind", ["shards", "stream"])
def test_masks_in_shards_are_left_out(tmp_path: Path, kind: str) -> None:
    skip_without(kind)
    files = examples([1]) | {"001-masklabel.png": picture(90), "001_mask.png": picture(91)}
    files |= {"002.png": picture(2), "002.txt": b"two", "003_mask.png": picture(3), "003_mask.txt": b"a mask"}
    opened = loader(source_of(tmp_path, kind, files), tmp_path)
    assert read(opened, 3) == [(1, "picture 1"), (2, "two"), (3, "a mask")]


def test_all_kinds_are_named_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    files = examples([1]) | {
        "001_mask.png": b"",
        "x.npz": b"",
        "y.heic" if ".heic" not in image_suffixes() else "y.cr2": b"",
    }
    files |= {
        "alone.txt": b"of nothing",
        ".git/config": b"",
        "readme": b"",
        "001.caption": b"beside a .txt",
        "sub/b.tar": b"",
    }
    loader(str(write_folder(tmp_path / "in", files)), tmp_path)
    lines = {line.split(": ")[1]: line.split(": ")[2] for line in caplog.messages if line.startswith("left out")}
    assert lines.pop("1 hidden files and folders") == ".git"
    assert lines.pop("1 masks and conditioning images") == "001_mask.png"
    assert lines.pop("2 texts without an image, or beside another") == "001.caption, alone.txt"
    assert lines.pop("1 files without a suffix") == "readme" and lines.pop("1 .npz files") == "x.npz"
    assert lines.pop("1 .tar files") == "sub/b.tar"
    [(kind, name)] = lines.items()
    assert (name == "y.heic" and "pillow-heif" in kind) or name == "y.cr2"


def test_a_folder_of_shards_names_its_other_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    files = {"0.tar": shard(examples([1])), "1.TAR": shard(examples([2])), "2.tar.gz": b"", "0.parquet": b""}
    assert read(loader(str(write_folder(tmp_path / "in", files)), tmp_path), 2) == [(1, "picture 1"), (2, "picture 2")]
    assert "1 .tar.gz files: 2.tar.gz" in caplog.text and "1 .parquet files: 0.parquet" in caplog.text
