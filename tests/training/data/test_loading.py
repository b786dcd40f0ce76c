"""Batches of a folder or of local shards: the same whatever reads them, resumed exactly, without what is broken."""

from __future__ import annotations

import itertools
import logging
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.picture_folders import examples, picture, shard, write_folder
from PIL import Image

from wuerstchen_core.common.dataclass_config import from_table
from wuerstchen_core.training.data.error_budget import ErrorBudget
from wuerstchen_core.training.data.loading import Batch, IndexedPictures, Pictures
from wuerstchen_core.training.data.open import ImageDataConfig, open_pictures

SHAPES = [[64, 64], [64, 128]]
Seen = list[tuple[list[int], list[str], tuple[int, ...]]]


def opened(source: str | Path | list[str], batch: int = 4, **options: Any) -> Pictures:
    """Pictures with a `[data]` table of two small buckets; other options are those of `open_pictures`."""
    own = {name: options.pop(name) for name in ("seed", "rank", "world", "captions") if name in options}
    kind = source if isinstance(source, list) else str(source)
    table = {"source": kind, "buckets": SHAPES, "workers": 0, **options}
    cache = Path(kind if isinstance(kind, str) else kind[0]).parent / "index"
    config = from_table(ImageDataConfig, table, "data")
    return open_pictures(config, batch=batch, cache=cache, **{"seed": 0, **own})


def numbers(batch: Batch) -> list[int]:
    """The pictures, each by its colour in the middle."""
    height, width = batch.images.shape[-2:]
    return batch.images[:, 0, height // 2, width // 2].tolist()


def read(pictures: Pictures, steps: int, start: int = 0) -> Seen:
    read = []
    for batch in itertools.islice(pictures.batches(start), steps):
        assert batch.images.dtype == torch.uint8 and batch.images.is_contiguous()
        read.append((numbers(batch), batch.captions, tuple(batch.images.shape)))
    return read


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    wide = {f"tall-{name}": content for name, content in examples(range(20, 27), 64, 128).items()}
    return write_folder(tmp_path / "pictures", examples(range(1, 14)) | wide)


def test_batches_of_every_shape_and_their_captions(folder: Path) -> None:
    seen = read(opened(folder), 12)
    for colours, captions, shape in seen:
        assert shape == ((4, 3, 128, 64) if colours[0] >= 20 else (4, 3, 64, 64))
        assert captions == [f"picture {number}" for number in colours]
    assert {number for colours, _, _ in seen[:6] for number in colours} == {*range(1, 14), *range(20, 27)}
    assert read(opened(folder, seed=1), 12) != seen


def test_a_run_goes_on_as_if_it_had_never_stopped(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(shard({path.name: path.read_bytes() for path in sorted(folder.iterdir())}))
    for source in (folder, tmp_path / "a.tar"):
        whole = read(opened(source, crop="random"), 14)
        for start in (1, 5, 9):
            assert read(opened(source, crop="random"), 14 - start, start) == whole[start:]
        last = next(opened(source).batches(8))
        assert last.next == 9 and opened(source).exact


def test_workers_change_nothing(folder: Path) -> None:
    (folder / "003.png").write_bytes(picture(3)[:-30])
    alone = list(itertools.islice(opened(folder, bad_share=1.0, crop="random").batches(3), 9))
    state = torch.random.get_rng_state()
    pictures = opened(folder, bad_share=1.0, crop="random", workers=2)
    for batch, other in zip(alone, pictures.batches(3), strict=False):
        assert torch.equal(batch.images, other.images)
        assert (batch.captions, batch.names, batch.next) == (other.captions, other.names, other.next)
    assert torch.equal(torch.random.get_rng_state(), state)  # nobody's chance is drawn from


def test_two_processes_see_what_one_sees(folder: Path) -> None:
    (folder / "003.png").write_bytes(picture(3)[:-30])
    one = read(opened(folder, batch=4, bad_share=1.0, crop="random"), 10)
    halves = [read(opened(folder, batch=2, bad_share=1.0, crop="random", rank=rank, world=2), 10) for rank in (0, 1)]
    for whole, left, right in zip(one, *halves, strict=True):
        assert whole[0] == left[0] + right[0] and whole[1] == left[1] + right[1]


def test_a_random_crop_is_one_of_its_step(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "pictures", {"1.txt": b"one"})
    stripes = torch.arange(256, dtype=torch.uint8).expand(64, 256)
    Image.fromarray(stripes.numpy()).save(folder / "1.png")
    lefts = {}
    for crop in ("centre", "random"):
        batches = itertools.islice(opened(folder, batch=2, crop=crop).batches(), 3)
        lefts[crop] = [left for batch in batches for left in batch.images[:, 0, 0, 0].tolist()]
    assert set(lefts["centre"]) == {96} and len(set(lefts["random"])) > 3
    second = itertools.islice(opened(folder, batch=1, rank=1, world=2, crop="random").batches(), 3)
    assert [int(batch.images[0, 0, 0, 0]) for batch in second] == lefts["random"][1::2]


def test_what_is_broken_is_replaced_named_once_and_counted(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:  # fmt: skip
    cut = picture(2)[:-30]
    for name, content in {"002.png": cut, "003.txt": b"\xff\xfe\xfa", "004.txt": b" "}.items():
        (folder / name).write_bytes(content)
    (folder / "005.txt").unlink()
    (folder / "006.png").write_bytes(b"")
    seen = read(opened(folder, bad_share=0.5), 15)
    for colours, captions, _ in seen:
        assert not {2, 3, 4, 5, 6} & set(colours) and captions == [f"picture {number}" for number in colours]
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(said) == 5 and said[0].startswith("left out, as number 1 of the bad pictures: 006.png is no picture")
    for name, reason in {"002": "cut short", "003": "not UTF-8", "004": "no caption", "005": "no caption"}.items():
        assert sum(f"{name}.png" in line and reason in line for line in said[1:]) == 1
    without = read(opened(folder, bad_share=0.5, captions=False), 15)
    colours = {number for colours, _, _ in without for number in colours}
    assert {3, 4, 5} <= colours and not {2, 6} & colours and set(without[0][1]) == {""}


def test_too_many_bad_pictures_stop_the_run(folder: Path) -> None:
    for number in (2, 3, 4):
        (folder / f"{number:03d}.txt").unlink()
    with pytest.raises(
        ValueError, match=r"^\d+ of \d\d+ pictures could not be used, more than \[data\] bad_share = 0.05"
    ) as told:
        read(opened(folder), 100)
    assert ".png" in str(told.value) and len(str(told.value)) < 300
    failed, _, total = str(told.value).split()[:3]
    assert int(total) >= 20 and int(failed) > 0.05 * int(total)
    assert len(read(opened(folder, bad_share=0.3), 100)) == 100


def test_a_share_is_allowed_up_to_itself() -> None:
    tally = ErrorBudget("pictures", 0.05)
    tally.add(19, {"a": "a is broken"})  # too few to say anything
    tally.add(1, {})
    tally.add(20, {"b": "b is broken"})
    with pytest.raises(ValueError, match=r"^3 of 41 pictures could not be used, .* = 0.05 allows: a, b; the log "):
        tally.add(1, {"a": "a is broken"})


def test_too_many_bad_files_stop_the_run_at_once(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "pictures", examples(range(1, 24)) | {"x.png": b"", "y.png": b"no picture"})
    with pytest.raises(ValueError, match=r"^2 of 25 pictures could not be used, .* allows: x.png, y.png; "):
        opened(folder)
    (tmp_path / "a.tar").write_bytes(shard(examples([1])))
    none = [tmp_path / f"{number}.tar" for number in range(19)]
    for path in none:
        path.write_bytes(b"")
    few = opened([str(tmp_path / "a.tar"), str(none[0])])
    assert numbers(next(few.batches())) == [1, 1, 1, 1]
    with pytest.raises(ValueError, match=r"^19 of 20 shards could not be used, "):
        opened([str(tmp_path / "a.tar"), *(str(path) for path in none)])


def test_a_bucket_of_nothing_good(tmp_path: Path) -> None:
    files = {f"{number}.png": picture(number)[:-30] for number in range(3)}
    folder = write_folder(tmp_path / "pictures", files)
    with pytest.raises(ValueError, match=r"^3 pictures in a row cannot be used: \d.png, \d.png, \d.png$"):
        read(opened(folder, bad_share=1.0, captions=False, workers=1), 1)


def test_a_run_knows_when_its_pictures_have_changed(folder: Path) -> None:
    first = print_of(folder)
    assert print_of(folder, workers=1, bad_share=0.5) == print_of(folder, batch=2, world=2, rank=1) == first
    options: list[dict[str, Any]] = [{"seed": 1}, {"batch": 5}, {"crop": "random"}, {"max_side": 100}]
    changed = {print_of(folder, **one) for one in options}
    (folder / "008.png").unlink()
    assert len(changed | {print_of(folder), first}) == 6


def print_of(source: Path, **options: Any) -> str:
    pictures = opened(source, **options)
    assert isinstance(pictures, IndexedPictures)
    return pictures.fingerprint()


ROWS = b'{"file_name": "009.png", "caption": "%s"}'
CHANGES = {  # one after the other
    "008.txt": b"picture B",
    "008.json": b'{"caption": "one"}',  # which the .txt hides
    "009.png": picture(99),
    "010.bmp": picture(98, kind="BMP"),
    "011.json": b'{"caption": "two"}',
    "metadata.jsonl": ROWS % b"three",
}


def test_other_pictures_and_captions_of_the_same_names_and_sizes_are_noticed(folder: Path) -> None:
    """Wherever they lie and whenever they were written."""
    (folder / "011.txt").unlink()
    write_folder(folder, {"010.bmp": picture(10, kind="BMP"), "010.txt": b"ten", "011.json": b'{"caption": "owt"}'})
    write_folder(folder, {"metadata.jsonl": ROWS % b"eerht"})
    prints = [print_of(folder)]
    for name, content in CHANGES.items():
        (folder / name).write_bytes(content)
        prints.append(print_of(folder))
    assert prints[1] == prints[2] and len(set(prints)) == len(CHANGES)
    shutil.copytree(folder, folder.parent / "copy")
    assert print_of(folder.parent / "copy") == prints[-1]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_names_that_are_no_utf_8(tmp_path: Path) -> None:
    name = os.fsdecode(b"\xfc")
    files = {f"{name}.png": picture(1), f"{name}.txt": b"one"}
    folder, tar = write_folder(tmp_path / name, files), tmp_path / f"{name}.tar"
    tar.write_bytes(shard(files))
    for source in (folder, tar, tar):  # of which the second is found in its index
        assert read(opened(source), 1)[0][:2] == ([1] * 4, ["one"] * 4)
    assert print_of(folder) != print_of(tar) == print_of(tar)


# sources


def test_what_is_left_out_is_counted_and_said(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    write_folder(folder, {"small.png": picture(50, 40, 40), "strip.png": picture(51, 64, 30)})
    read(opened(folder, min_side=35), 1)
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        "20 pictures, left out 1 smaller than every bucket, 1 too small",
        "bucket 64x64: 13",
        "bucket 64x128: 7",
    ]
    caplog.clear()
    opened(folder, batch=10)
    assert caplog.records[-1].getMessage() == "bucket 64x128: 7, fewer than a batch: they repeat in it"
    with pytest.raises(ValueError, match=r"^no picture is left of 22 that can be read: 22 without aesthetic score; "):
        opened(folder, min_aesthetic=5.0)


def test_shards_by_pattern_by_list_and_by_folder(tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    for number in range(3):
        (shards / f"{number:05d}.tar").write_bytes(shard(examples([10 * number + 1, 10 * number + 2])))
    pattern = str(shards / "{00000..00002}.tar")
    by_pattern = read(opened(pattern), 6)
    assert sorted({number for colours, _, _ in by_pattern for number in colours}) == [1, 2, 11, 12, 21, 22]
    assert read(opened([str(shards / f"{number:05d}.tar") for number in range(3)]), 6) == by_pattern
    assert read(opened(shards), 6) == by_pattern


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("none", "does not exist: give a folder of pictures, or shards"),
        ("s3://bucket/a.tar", "s3://bucket/a.tar is not read: give an http(s):// address, or a pipe: that fetches it"),
        ("empty", "holds no picture that can be read"),
        ("a.tgz", "a.tgz is no shard: give .tar files that are not compressed"),
        ("{a,b", "{a,b opens a brace that it does not close"),
        (["good", "good/a.tar"], "names both shards and folders of pictures"),
        (["good", "http://localhost/a.tar"], "names streams and files"),
        ("mixed", "mixed holds both shards and pictures: give a folder of either"),
    ],
)
def test_a_source_that_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str | list[str], message: str
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path, {"empty/notes.txt": b"none", "good/1.png": picture(1), "a.tgz": b""})
    write_folder(tmp_path, {f"{name}/a.tar": shard(examples([1])) for name in ("other", "mixed")})
    write_folder(tmp_path / "mixed", {"below/2.png": picture(2)})
    source = ["good", "other/a.tar"] if message.startswith("names both") else source
    with pytest.raises(ValueError) as error:
        opened(source)
    assert message in str(error.value) and len(str(error.value)) < 300 and "\n" not in str(error.value)


def test_a_seed_is_not_negative(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"^\[train\] seed must be 0 or more, got -1$"):
        opened(folder, seed=-1)
