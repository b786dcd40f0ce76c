"""Batches of a folder or of local shards: equal for any number of workers, resumed exactly, without damaged files."""

from __future__ import annotations

import itertools
import logging
import multiprocessing
import os
import shutil
import sys
import threading
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.picture_folders import examples, picture, shard, write_folder
from PIL import Image
from torch.utils.data import Dataset

from wuerstchen_core.common.dataclass_config import from_table
from wuerstchen_core.inference.image_files import LARGE_PICTURE, turn
from wuerstchen_core.training.data import loading
from wuerstchen_core.training.data.error_budget import ErrorBudget
from wuerstchen_core.training.data.filters import ImageDataConfig
from wuerstchen_core.training.data.loading import Batch, BatchLoader
from wuerstchen_core.training.data.open import open_loader

SHAPES = [[64, 64], [64, 128]]
Seen = list[tuple[list[int], list[str], tuple[int, ...]]]


def opened(source: str | Path | list[str], batch: int = 4, **options: Any) -> BatchLoader:
    """Opens a source with two small buckets; `options` are keys of `[data]` or arguments of `open_loader`."""
    arguments = {name: options.pop(name) for name in ("seed", "rank", "world", "captions") if name in options}
    source_names = source if isinstance(source, list) else str(source)
    table = {"source": source_names, "buckets": SHAPES, "workers": 0, **options}
    cache = Path(source_names if isinstance(source_names, str) else source_names[0]).parent / "index"
    config = from_table(ImageDataConfig, table, "data")
    return open_loader(config, batch=batch, cache=cache, **{"seed": 0, **arguments})


def numbers(batch: Batch) -> list[int]:
    """Returns the number of each image, which is the red of its central pixel."""
    height, width = batch.images.shape[-2:]
    return batch.images[:, 0, height // 2, width // 2].tolist()


def read(loader: BatchLoader, steps: int, start: int = 0) -> Seen:
    read = []
    for batch in itertools.islice(loader.batches(start), steps):
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


def test_a_run_resumes_exactly(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(shard({path.name: path.read_bytes() for path in sorted(folder.iterdir())}))
    for source in (folder, tmp_path / "a.tar"):
        whole = read(opened(source, crop="random"), 14)
        for start in (1, 5, 9):
            assert read(opened(source, crop="random"), 14 - start, start) == whole[start:]
        last = next(opened(source).batches(8))
        assert last.next == 9


def test_workers_do_not_change_the_batches(folder: Path) -> None:
    (folder / "003.png").write_bytes(picture(3)[:-30])
    alone = list(itertools.islice(opened(folder, bad_share=1.0, crop="random").batches(3), 9))
    state = torch.random.get_rng_state()
    loader = opened(folder, bad_share=1.0, crop="random", workers=2)
    for batch, other in zip(alone, loader.batches(3), strict=False):
        assert torch.equal(batch.images, other.images)
        assert (batch.captions, batch.next) == (other.captions, other.next)
    assert torch.equal(torch.random.get_rng_state(), state)  # the global random numbers are untouched


class PicturesInMemory(Dataset[bool]):
    """True for a picture that is in memory while another worker has one in memory, for which it waits."""

    def __init__(self, pixels: int, patience: float):
        self.pixels, self.patience, self.both = pixels, patience, multiprocessing.Barrier(2)

    def __getitem__(self, index: int) -> bool:
        with turn(self.pixels), turn(self.pixels), suppress(threading.BrokenBarrierError):  # as a picture and its mask
            self.both.wait(self.patience)
            return True
        return False


def test_workers_read_one_large_picture_at_a_time(folder: Path) -> None:
    loader = opened(folder, workers=2)
    assert list(loader.results(PicturesInMemory(LARGE_PICTURE + 1, 0.5), range(2))) == [False, False]
    assert list(loader.results(PicturesInMemory(LARGE_PICTURE, 60), range(2))) == [True, True]


def test_there_are_no_more_workers_by_default_than_cores(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[int] = []
    monkeypatch.setattr(loading, "DataLoader", lambda *_, num_workers, **options: started.append(num_workers) or [])
    for workers, cores in ((None, 2), (None, 9), (3, 2)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: range(cores), raising=False)
        loader = opened(folder)
        loader.config = replace(loader.config, workers=workers)
        list(loader.batches())
    assert started == [2, loading.WORKERS, 3]


def test_two_processes_see_what_one_sees(folder: Path) -> None:
    (folder / "003.png").write_bytes(picture(3)[:-30])
    one = read(opened(folder, batch=4, bad_share=1.0, crop="random"), 10)
    halves = [read(opened(folder, batch=2, bad_share=1.0, crop="random", rank=rank, world=2), 10) for rank in (0, 1)]
    for whole, left, right in zip(one, *halves, strict=True):
        assert whole[0] == left[0] + right[0] and whole[1] == left[1] + right[1]


def test_a_random_crop_depends_on_its_step_and_slot(tmp_path: Path) -> None:
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


def test_damaged_images_are_replaced_named_once_and_counted(
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
    messages = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(messages) == 5 and "number 1: 006.png" in messages[0]
    for name, reason in {"002": "damaged", "003": "not UTF-8", "004": "no caption", "005": "no caption"}.items():
        assert sum(f"{name}.png" in line and reason in line for line in messages[1:]) == 1
    uncaptioned = read(opened(folder, bad_share=0.5, captions=False), 15)
    colours = {number for colours, _, _ in uncaptioned for number in colours}
    assert {3, 4, 5} <= colours and not {2, 6} & colours and set(uncaptioned[0][1]) == {""}


def test_too_many_bad_images_stop_the_run(folder: Path) -> None:
    for number in (2, 3, 4):
        (folder / f"{number:03d}.txt").unlink()
    with pytest.raises(ValueError, match=r"^\d+ of \d\d+ images .*bad_share = 0.05.*\.png") as error:
        read(opened(folder), 100)
    assert len(str(error.value)) < 300
    failed, _, total = str(error.value).split()[:3]
    assert int(total) >= 20 and int(failed) > 0.05 * int(total)
    assert len(read(opened(folder, bad_share=0.3), 100)) == 100


def test_the_error_budget_may_be_used_up() -> None:
    budget = ErrorBudget("images", 0.05)
    budget.add(19, {"a": "a is broken"})  # too few reads to judge
    budget.add(1, {})
    budget.add(20, {"b": "b is broken"})
    with pytest.raises(ValueError, match="3 of 41 images .* 0.05 .*a, b;"):
        budget.add(1, {"a": "a is broken"})


def test_too_many_bad_files_stop_the_run_at_once(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "pictures", examples(range(1, 24)) | {"x.png": b"", "y.png": b"no picture"})
    with pytest.raises(ValueError, match="2 of 25 images .*x.png, y.png;"):
        opened(folder)
    (tmp_path / "a.tar").write_bytes(shard(examples([1])))
    none = [tmp_path / f"{number}.tar" for number in range(19)]
    for path in none:
        path.write_bytes(b"")
    few = opened([str(tmp_path / "a.tar"), str(none[0])])
    assert numbers(next(few.batches())) == [1, 1, 1, 1]
    with pytest.raises(ValueError, match="19 of 20 shards"):
        opened([str(tmp_path / "a.tar"), *(str(path) for path in none)])


def test_a_bucket_without_readable_images(tmp_path: Path) -> None:
    files = {f"{number}.png": picture(number)[:-30] for number in range(3)}
    folder = write_folder(tmp_path / "pictures", files)
    with pytest.raises(ValueError, match=r"^3 images .*\d.png, \d.png, \d.png$"):
        read(opened(folder, bad_share=1.0, captions=False, workers=1), 1)


def test_the_fingerprint_depends_on_images_and_settings(folder: Path) -> None:
    first = fingerprint(folder)
    assert fingerprint(folder, workers=1, bad_share=0.5) == fingerprint(folder, batch=2, world=2, rank=1) == first
    options: list[dict[str, Any]] = [{"seed": 1}, {"batch": 5}, {"crop": "random"}, {"max_side": 100}]
    changed = {fingerprint(folder, **one) for one in options}
    (folder / "008.png").unlink()
    assert len(changed | {fingerprint(folder), first}) == 6


def fingerprint(source: Path, **options: Any) -> str:
    return opened(source, **options).fingerprint()


ROWS = b'{"file_name": "009.png", "caption": "%s"}'
CHANGES = {  # applied one after the other
    "008.txt": b"picture B",
    "008.json": b'{"caption": "one"}',  # ignored beside a .txt
    "009.png": picture(99),
    "010.bmp": picture(98, kind="BMP"),
    "011.json": b'{"caption": "two"}',
    "metadata.jsonl": ROWS % b"three",
}


def test_the_fingerprint_depends_on_contents(folder: Path) -> None:
    """Not on the folder or the time of change."""
    (folder / "011.txt").unlink()
    write_folder(folder, {"010.bmp": picture(10, kind="BMP"), "010.txt": b"ten", "011.json": b'{"caption": "owt"}'})
    write_folder(folder, {"metadata.jsonl": ROWS % b"eerht"})
    prints = [fingerprint(folder)]
    for name, content in CHANGES.items():
        (folder / name).write_bytes(content)
        prints.append(fingerprint(folder))
    assert prints[1] == prints[2] and len(set(prints)) == len(CHANGES)
    shutil.copytree(folder, folder.parent / "copy")
    assert fingerprint(folder.parent / "copy") == prints[-1]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has such names")
def test_names_that_are_not_utf_8(tmp_path: Path) -> None:
    name = os.fsdecode(b"\xfc")
    files = {f"{name}.png": picture(1), f"{name}.txt": b"one"}
    folder, tar = write_folder(tmp_path / name, files), tmp_path / f"{name}.tar"
    tar.write_bytes(shard(files))
    for source in (folder, tar, tar):  # the second time from its index
        assert read(opened(source), 1)[0][:2] == ([1] * 4, ["one"] * 4)
    assert fingerprint(folder) != fingerprint(tar) == fingerprint(tar)


def test_rejected_images_are_counted(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    write_folder(folder, {"small.png": picture(50, 40, 40), "strip.png": picture(51, 64, 30)})
    read(opened(folder, min_side=35), 1)
    messages = [record.getMessage() for record in caplog.records]
    assert "20 images" in messages[0] and "1 smaller than every bucket, 1 too small" in messages[0]
    assert messages[1:] == ["bucket 64x64: 13", "bucket 64x128: 7"]
    caplog.clear()
    opened(folder, batch=10)
    assert caplog.records[-1].getMessage().startswith("bucket 64x128: 7, fewer")
    with pytest.raises(ValueError, match="22 without aesthetic score"):
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
        ("none", "none does not exist"),
        ("nothing://bucket/a.tar", "nothing"),
        ("empty", "no readable image"),
        ("a.tgz", "a.tgz .*uncompressed"),
        ("{a,b", "{a,b .*brace"),
        (["good", "other/a.tar"], "both shards and folders"),
        (["good", "http://localhost/a.tar"], "both streams and files"),
        ("mixed", "mixed .*both shards and images"),
    ],
)
def test_unusable_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str | list[str], message: str
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path, {"empty/notes.txt": b"none", "good/1.png": picture(1), "a.tgz": b""})
    write_folder(tmp_path, {f"{name}/a.tar": shard(examples([1])) for name in ("other", "mixed")})
    write_folder(tmp_path / "mixed", {"below/2.png": picture(2)})
    with pytest.raises(ValueError, match=message) as error:
        opened(source)
    assert len(str(error.value)) < 300 and "\n" not in str(error.value)
