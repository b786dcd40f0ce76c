"""The lock on a folder."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from wuerstchen_core.common import lock
from wuerstchen_core.common.lock import LOCK, file_lock, folder_lock

ROOT = Path(__file__).parents[2]
# Locks a folder, says so, and waits; with "fork", its child process inherits its files and outlives it.
HOLDER = """
import os, sys, time
from pathlib import Path
from typing import BinaryIO
from wuerstchen_core.common.lock import folder_lock
with folder_lock(Path(sys.argv[1])):
    if sys.argv[2] == "fork" and os.fork() == 0:
        os.closerange(0, 3)
        time.sleep(30)
        os._exit(0)
    print("locked", flush=True)
    time.sleep(30)
"""


def hold(folder: Path, mode: str = "") -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder), mode], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None and process.stdout.readline() == "locked\n"
    return process


def test_a_file_system_without_locks_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_locks(file: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    with folder_lock(tmp_path):
        pass
    assert not caplog.text
    monkeypatch.setattr(lock, "_lock", no_locks)
    with folder_lock(tmp_path):
        assert str(tmp_path) in caplog.text


def test_another_process_is_named_until_it_is_dead(tmp_path: Path) -> None:
    process = hold(tmp_path)
    try:
        with pytest.raises(ValueError, match=rf"{tmp_path.name}.* {process.pid} ") as error, folder_lock(tmp_path):
            pass
        assert "\n" not in str(error.value)
    finally:
        process.kill()
        process.communicate()
    with folder_lock(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text("utf-8"))["pid"] == os.getpid()


@pytest.mark.skipif(multiprocessing.get_all_start_methods()[0] == "spawn", reason="needs fork")
def test_a_child_that_outlives_a_killed_process_has_no_lock(tmp_path: Path) -> None:
    process = hold(tmp_path, "fork")
    process.kill()
    process.communicate()
    with folder_lock(tmp_path):
        pass


def test_a_process_does_not_lock_twice(tmp_path: Path) -> None:
    with folder_lock(tmp_path / "new"):
        for _ in range(2):  # a refused attempt leaves the lock
            with pytest.raises(ValueError, match=str(os.getpid())), folder_lock(tmp_path / "new"):
                pass
        with folder_lock(tmp_path / "other"):
            pass
    with folder_lock(tmp_path / "new"):
        pass


def test_the_lock_leaves_nothing_and_ranks_share_a_folder(tmp_path: Path) -> None:
    with folder_lock(tmp_path), folder_lock(tmp_path, 1):
        assert len(list(tmp_path.iterdir())) == 2
    assert not list(tmp_path.iterdir())


def test_a_lock_file_that_was_removed_is_locked_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by a process that ends between the opening and the locking of its file."""
    files = []

    def removed_first(file: BinaryIO) -> None:
        files.append(file)
        if len(files) == 1:
            (tmp_path / LOCK).unlink()

    monkeypatch.setattr(lock, "_lock", removed_first)
    with folder_lock(tmp_path):
        assert len(files) == 2 and files[0].closed and (tmp_path / LOCK).exists()


def test_a_lock_that_never_stays_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("os.path.samestat", lambda one, other: False)
    with folder_lock(tmp_path):
        assert str(tmp_path) in caplog.text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("below", [Path(), Path("below")])
def test_a_file_in_the_place_of_a_folder_is_one_sentence(tmp_path: Path, below: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(OSError, match=r"file.* was not locked: [a-z ]+:") as error,
        folder_lock(tmp_path / "file" / below),
    ):
        pass
    assert "Errno" not in str(error.value)


class Windows:
    """The module `os` of another system."""

    name = "nt"

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)


def test_windows_removes_a_closed_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files: list[BinaryIO] = []
    closed = []
    monkeypatch.setattr(lock, "os", Windows())
    monkeypatch.setattr(lock, "_lock", files.append)
    monkeypatch.setattr(lock, "remove", lambda path: closed.append(files[0].closed))
    with folder_lock(tmp_path):
        assert not files[0].closed
    assert closed == [True]


def test_files_of_a_folder_are_locked_one_by_one(tmp_path: Path) -> None:
    with file_lock(tmp_path / "new" / "a"), file_lock(tmp_path / "new" / "b"):
        with pytest.raises(ValueError, match=rf"new.a .*{os.getpid()}"), file_lock(tmp_path / "new" / "a"):
            pass
    assert not list((tmp_path / "new").iterdir())


def test_a_full_disk_is_named_and_leaves_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, content: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.write", full)
    with pytest.raises(OSError, match=f"{tmp_path.name} .*full"), folder_lock(tmp_path):
        pass
    assert not list(tmp_path.iterdir())
