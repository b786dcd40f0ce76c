"""Shards from the web and from commands: their order, resuming at the next shard, and permission for commands."""

from __future__ import annotations

import itertools
import logging
import re
import shutil
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pytest
from helpers.picture_folders import examples, picture, shard, table

from wuerstchen_core.common.dataclass_config import from_table
from wuerstchen_core.inference import image_files
from wuerstchen_core.training.data.filters import ImageDataConfig
from wuerstchen_core.training.data.loading import Batch, BatchLoader
from wuerstchen_core.training.data.open import open_loader
from wuerstchen_core.training.data.streams import without_secrets

pytest.importorskip("webdataset")
SHARDS = 6


class Reading:
    """The lock on large pictures."""

    def __init__(self) -> None:
        self.held = 0

    def __enter__(self) -> None:
        self.held += 1

    def __exit__(self, *_: object) -> None:
        self.held -= 1


class Quiet(SimpleHTTPRequestHandler):
    """Serves files by name or, like some stores, by a query: /get?shard=3."""

    def log_message(self, *_: Any) -> None:
        pass

    def translate_path(self, path: str) -> str:
        return super().translate_path(re.sub(r"/get\?shard=(\d+)", r"/\1.tar", path))


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Six shards of four images each: number 3 contains 30 to 33."""
    for number in range(SHARDS):
        (tmp_path / f"{number}.tar").write_bytes(shard(examples(range(10 * number, 10 * number + 4))))
    return tmp_path


@pytest.fixture
def site(shards: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if shutil.which("curl") is None:
        pytest.skip("shards from the web are read through curl")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(shards)))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def opened(source: str | list[str], batch: int = 4, rank: int = 0, world: int = 1, **values: Any) -> BatchLoader:
    """Opens a stream."""
    data = {"source": source, "buckets": [[64, 64]], "workers": 0, "allow_pipe": True, **values}
    config = from_table(ImageDataConfig, data, "data")
    return open_loader(config, batch=batch, seed=0, cache=Path("unused"), rank=rank, world=world)


def local(shards: Path) -> str:
    """Returns a source that streams local shards."""
    return f"pipe:cat {shards}/{{0..{SHARDS - 1}}}.tar"


def numbers(batch: Batch) -> list[int]:
    return batch.images[:, 0, 0, 0].tolist()


def read(loader: BatchLoader, steps: int, start: int = 0) -> list[list[int]]:
    return [numbers(batch) for batch in itertools.islice(loader.batches(start), steps)]


def test_shards_from_the_web(site: str, shards: Path) -> None:
    source = f"{site}/{{0..{SHARDS - 1}}}.tar"
    batches = list(itertools.islice(opened(source).batches(), 2 * SHARDS))
    tens = [numbers(batch)[0] // 10 for batch in batches]
    for ten, batch in zip(tens, batches, strict=True):
        assert numbers(batch) == list(range(10 * ten, 10 * ten + 4))
        assert batch.captions == [f"picture {number}" for number in numbers(batch)]
    assert sorted(tens[:SHARDS]) == sorted(tens[SHARDS:]) == list(range(SHARDS))  # each round has all shards, shuffled
    assert tens[:SHARDS] != tens[SHARDS:] and tens[:SHARDS] != sorted(tens[:SHARDS])
    assert read(opened(local(shards)), 12) == [numbers(batch) for batch in batches]


def test_a_stream_resumes_at_its_next_shard_and_logs_it(shards: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    whole = list(itertools.islice(opened(local(shards), batch=2).batches(), 24))
    assert [batch.next for batch in whole] == [number // 2 + 1 for number in range(24)]
    assert "resumes" not in caplog.text
    stopped = whole[6]  # in the middle of the fourth shard
    rest = opened(local(shards), batch=2).batches(stopped.next)
    assert [numbers(batch) for batch in itertools.islice(rest, 16)] == [numbers(batch) for batch in whole[8:]]
    assert "resumes at shard 4" in caplog.text


def test_processes_and_workers_divide_the_shards(shards: Path) -> None:
    whole = read(opened(local(shards)), 12)
    parts = [read(opened(local(shards), rank=rank, world=2), 6) for rank in (0, 1)]
    assert [parts[0], parts[1]] == [whole[0::2], whole[1::2]]
    batches = list(itertools.islice(opened(local(shards), batch=2, workers=2).batches(), 8))
    assert sorted(sum(map(numbers, batches), [])) == sorted(sum(whole[:4], []))
    assert [batch.next for batch in batches] == [1, 2, 2, 2, 3, 4, 4, 4]  # never back to a shard that was begun


def test_buckets_and_filters(shards: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    files = examples(range(2)) | examples(range(2, 4), 64, 128) | {"x.png": picture(9, 32, 32)}
    for number, score in ((0, 5.5), (1, 4.0), (2, 6.0), (3, 7.0)):
        files[f"{number:03d}.json"] = table(AESTHETIC_SCORE=score)
    grouped = shard(dict(sorted(files.items())))
    (shards / "mixed.tar").write_bytes(grouped)
    loader = opened(f"pipe:cat {shards}/mixed.tar", batch=2, buckets=[[64, 64], [64, 128]], min_aesthetic=5.0)
    batches = list(itertools.islice(loader.batches(), 6))
    assert {(tuple(numbers(batch)), batch.images.shape[-2:]) for batch in batches} == {
        ((2, 3), (128, 64)),
        ((0, 0), (64, 64)),
    }
    assert "1 of low aesthetic score, 1 without aesthetic score" in caplog.text
    with pytest.raises(ValueError, match="5 images, 0 .*5 too small"):
        read(opened(f"pipe:cat {shards}/mixed.tar", min_side=500), 1)


def test_damaged_files_are_named_and_skipped(site: str, shards: Path, caplog: pytest.LogCaptureFixture) -> None:
    (shards / "1.tar").write_bytes(b"")
    (shards / "2.tar").write_bytes(shard({}))
    (shards / "3.tar").write_bytes((shards / "3.tar").read_bytes()[:1540])
    broken = examples(range(40, 44)) | {"040.png": picture(40)[:-30], "041.txt": b"\xff\xfe\xfa"}
    (shards / "4.tar").write_bytes(shard(broken))
    source = f"{site}/{{0..{SHARDS}}}.tar"  # the last one does not exist
    seen = {number for batch in read(opened(source, batch=1, bad_share=0.9), 40) for number in batch}
    assert seen == {0, 1, 2, 3, 42, 43, 50, 51, 52, 53}
    messages = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(messages) == len(set(messages)) == 7
    for name, reason in (
        ("1.tar", "cannot be read"),
        ("2.tar", "no image"),
        ("3.tar", "cannot be read to its end"),
        ("3.tar:030", "no caption"),
        ("4.tar:040", "damaged"),
        ("4.tar:041", "not UTF-8"),
        (f"{SHARDS}.tar", "cannot be read"),
    ):
        assert sum(f"{site}/{name} " in line and reason in line for line in messages) == 1, name
    with pytest.raises(ValueError, match=r"^\d+ of 20 shards .*bad_share = 0.05"):
        read(opened([f"{site}/0.tar", f"{site}/1.tar"], batch=1), 100)


def test_a_stream_without_readable_shards(tmp_path: Path) -> None:
    source = [f"pipe:cat {tmp_path}/{name}.tar" for name in "ab"]
    with pytest.raises(ValueError, match="0 images.*/a.tar, .*/b.tar"):
        read(opened(source), 1)


@pytest.mark.parametrize("bad", [0, 1])
def test_shards_can_differ_in_their_query_alone(site: str, shards: Path, bad: int) -> None:
    """One bad shard does not count for all of them, whichever comes first."""
    (shards / f"{bad}.tar").write_bytes(b"")
    ((first, *_),) = read(opened([f"{site}/get?shard={number}" for number in (0, 1)]), 1)
    assert first == 10 * (1 - bad)


def test_a_pipe_runs_only_when_it_is_allowed(shards: Path, tmp_path: Path) -> None:
    source = f"pipe:touch {tmp_path}/ran; cat {shards}/0.tar"
    with pytest.raises(ValueError, match="pipe:touch .*allow_pipe"):
        opened(source, allow_pipe=False)
    assert not (tmp_path / "ran").exists()
    assert read(opened(source), 1) == [[0, 1, 2, 3]] and (tmp_path / "ran").exists()


def test_missing_software_is_reported_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="curl"):
        opened(["http://localhost/1.tar", "pipe:cat 1.tar"])
    monkeypatch.setitem(sys.modules, "webdataset", None)
    with pytest.raises(ModuleNotFoundError) as error:
        opened("pipe:cat 1.tar")
    assert error.value.name == "webdataset"


def test_secrets_in_an_address_are_not_logged() -> None:
    assert without_secrets("https://me:word@host:8/a/1.tar?key=5") == "https://host:8/a/1.tar"
    assert without_secrets("pipe:cat 1.tar") == "pipe:cat 1.tar"


def test_streams_by_fsspec(shards: Path) -> None:
    memory = fsspec.filesystem("memory")
    for path in shards.glob("*.tar"):
        memory.pipe(f"/bucket/{path.name}", path.read_bytes())
    try:
        for source in (f"memory://bucket/{{0..{SHARDS - 1}}}.tar", f"{shards.as_uri()}/{{0..{SHARDS - 1}}}.tar"):
            assert read(opened(source), 12) == read(opened(local(shards)), 12)
            assert opened(source).fingerprint() == opened(local(shards)).fingerprint()
    finally:
        memory.rm("/bucket", recursive=True)
    parts = opened(f"{shards.as_uri()}/{{0..{SHARDS - 1}}}.tar", batch=2, workers=2)
    assert len({number for numbers in read(parts, 2 * SHARDS) for number in numbers}) == 4 * SHARDS


class Locked(fsspec.AbstractFileSystem):  # type: ignore[misc]
    protocol = "locked"

    def _open(self, *_: Any, **__: Any) -> Any:
        raise PermissionError("https://store/0.tar?signature=secret is forbidden")


def test_errors_of_fsspec_have_no_secrets(caplog: pytest.LogCaptureFixture) -> None:
    fsspec.register_implementation("locked", Locked, clobber=True)
    with pytest.raises(ValueError, match=r"locked://store/\d+\.tar") as raised:
        read(opened("locked://key:secret@store/{0..30}.tar?token=secret"), 1)
    assert "secret" not in caplog.text + str(raised.value) and "PermissionError" in caplog.text
    for source in ("nothing://store/0.tar", ["locked://store/0.tar", "/0.tar"]):
        with pytest.raises(ValueError, match="source"):
            opened(source)


def test_large_pictures_are_cropped_in_turn(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock, held, crop = Reading(), list[int](), ImageDataConfig.crop_image
    monkeypatch.setattr(image_files, "LARGE_PICTURE", 0)
    monkeypatch.setattr(image_files, "_turns", lock)
    monkeypatch.setattr(ImageDataConfig, "crop_image", lambda *args: held.append(lock.held) or crop(*args))
    next(iter(opened(local(shards)).batches()))
    assert held and all(held) and not lock.held
