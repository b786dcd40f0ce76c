"""A training that is killed at any moment gives the same result once it is resumed."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from helpers.picture_folders import examples, write_folder
from helpers.recording_trainer import CONFIG, LineStage, assert_same_training, file_names
from torch.utils.data import Dataset

from wuerstchen_core.training.checkpoint import LOG
from wuerstchen_core.training.data.files import FileDataset
from wuerstchen_core.training.data.loading import BatchLoader
from wuerstchen_core.training.loop import train
from wuerstchen_core.training.rng import StepRandom

FORKS = "forkserver" in multiprocessing.get_all_start_methods()
pytestmark = pytest.mark.skipif(not FORKS, reason="the processes are forked from one that has imported torch")

LONG = replace(CONFIG, steps=60, log_every=1, save_every=7, sheet_every=9)
WAIT = 60.0  # seconds at most


def train_long(folder: Path) -> None:
    """Runs the training that the tests kill."""
    torch.set_num_threads(1)
    train(LineStage(), LONG, folder)


def stop_halfway(folder: Path) -> None:
    """Runs the same training, but waits when half of the checkpoint of step 14 is on disk, and says so in a file."""
    write = torch.save

    def halfway(contents: dict[str, Any], path: Path) -> None:
        write(contents, path)
        if contents["step"] == 14:
            os.truncate(path, path.stat().st_size // 2)
            folder.with_name("halfway").touch()
            time.sleep(WAIT)

    torch.save = halfway  # type: ignore[assignment]
    train_long(folder)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    return train(LineStage(), LONG, tmp_path_factory.mktemp("whole")).parent


@contextmanager
def killed_process(work: Callable[[Path], None], folder: Path) -> Iterator[None]:
    """Runs `work` in another process, which is killed at the end of the block."""
    context: Any = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["accelerate", "torch.distributed.tensor"])
    process = context.Process(target=work, args=(folder,))
    process.start()
    try:
        yield
    finally:
        process.kill()
        process.join()
    assert process.exitcode == -signal.SIGKILL, "the process ended before it was killed"


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.0005)


def rows(folder: Path) -> int:
    log = folder / LOG
    return log.read_text().count("\n") if log.exists() else 0


class PicturesStage(LineStage):
    """Learns the sum of the mean colours of images that worker processes read."""

    def __init__(self, folder: Path):
        super().__init__(width=3)
        source = {"source": str(folder), "buckets": [[64, 64], [128, 64]], "workers": 2}
        self.dataset = FileDataset(source)

    def prepare(self, picked: Any, step: int, rng: StepRandom) -> tuple[Any, ...]:
        return (self.dataset.images(picked).mean(dim=(2, 3)) + rng.normal(3),)


def train_on_pictures(folder: Path) -> None:
    torch.set_num_threads(1)
    train(PicturesStage(folder.parent / "pictures"), LONG, folder)


def check_killed(folder: Path, whole: Path, seed: int) -> None:
    """Kills a training twice, at moments that depend on the seed, and resumes it."""
    rng = random.Random(seed)
    steps = sorted(rng.sample(range(1, 55), 2))
    for step in steps:
        with killed_process(train_long, folder):
            wait_for(lambda step=step: rows(folder) >= step)  # type: ignore[misc]
            time.sleep(rng.random() * 0.01)
    train(LineStage(), LONG, folder)
    assert_same_training(folder, whole)


@pytest.mark.parametrize("seed", range(3))
def test_killed(tmp_path: Path, whole: Path, seed: int) -> None:
    check_killed(tmp_path, whole, seed)


def test_killed_while_workers_read_images(tmp_path: Path) -> None:
    """The resumed run reads the same images, of two sizes, as an uninterrupted one."""
    write_folder(tmp_path / "pictures", {**examples(range(14)), **examples(range(20, 27), 128, 64)})
    for seed in range(2):
        with killed_process(train_on_pictures, tmp_path / "killed"):
            wait_for(lambda seed=seed: rows(tmp_path / "killed") >= 10 + 20 * seed)  # type: ignore[misc]
    for name in ("killed", "whole"):
        train_on_pictures(tmp_path / name)
    assert_same_training(tmp_path / "killed", tmp_path / "whole")


class SlowImages(Dataset[int]):
    """Images that take longer to read than any test; each worker that reads one leaves a file named by its id."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __getitem__(self, index: int) -> int:
        (self.folder / str(os.getpid())).touch()
        time.sleep(2 * WAIT)
        return index


def read_slowly(folder: Path) -> None:
    loader: Any = SimpleNamespace(config=SimpleNamespace(workers=2))
    list(BatchLoader.results(loader, SlowImages(folder), range(9)))


def is_running(pid: int) -> bool:
    """True if there is a process of this number that has not ended."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:  # it may end at any moment
        return False


def test_workers_end_with_a_killed_process(tmp_path: Path) -> None:
    with killed_process(read_slowly, tmp_path):
        wait_for(lambda: len(file_names(tmp_path)) == 2)
    workers = [int(name) for name in file_names(tmp_path)]
    wait_for(lambda: not any(map(is_running, workers)))


@pytest.mark.long
@pytest.mark.parametrize("seed", range(3, 23))
def test_killed_at_many_moments(tmp_path: Path, whole: Path, seed: int) -> None:
    check_killed(tmp_path, whole, seed)


def test_killed_before_it_removes_an_old_checkpoint(tmp_path: Path, whole: Path) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "run"))
    shutil.copy(folder / "checkpoint-00000056.pt", folder / "checkpoint-00000049.pt")
    train(LineStage(), LONG, folder)
    assert_same_training(folder, whole)


def test_killed_while_it_writes_a_checkpoint(tmp_path: Path, whole: Path) -> None:
    """Half of the file of step 14 is on disk: the run resumes from step 7 and removes it."""
    folder = tmp_path / "run"
    with killed_process(stop_halfway, folder):
        wait_for((tmp_path / "halfway").exists)
    (draft,) = folder.glob(".checkpoint-00000014.pt.*.part")
    assert 0 < draft.stat().st_size < (whole / "checkpoint-00000056.pt").stat().st_size * 0.6
    assert "checkpoint-00000014.pt" not in file_names(folder)
    (folder / ".prior.safetensors.1.part").write_bytes(b"half")  # of another killed process
    train(LineStage(), LONG, folder)
    assert_same_training(folder, whole)
