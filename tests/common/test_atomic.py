"""Files appear whole or not at all."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from wuerstchen_core.checkpoints.writer import write_tensors
from wuerstchen_core.common.atomic import check_room, create_file, remove_drafts, replace_file


@pytest.mark.parametrize("name", ["n" * 251 + ".png", "𝒂" * 62 + ".png"])
def test_a_name_may_have_255_bytes(name: str, tmp_path: Path) -> None:
    replace_file(tmp_path / name, Path.touch)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old", "utf-8")
    replace_file(path, lambda draft: draft.write_text("new", "utf-8"))
    assert path.read_text("utf-8") == "new" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EIO])
def test_a_failed_write_keeps_the_old_file_and_names_it(tmp_path: Path, number: int) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old", "utf-8")

    def fail(draft: Path) -> None:
        draft.write_text("half", "utf-8")
        raise OSError(number, "no")

    with pytest.raises(OSError, match="a.txt was not written") as raised:
        replace_file(path, fail)
    assert "\n" not in str(raised.value)
    assert path.read_text("utf-8") == "old" and list(tmp_path.iterdir()) == [path]


def test_an_interrupt_leaves_no_draft(tmp_path: Path) -> None:
    def interrupt(draft: Path) -> None:
        draft.touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replace_file(tmp_path / "a.txt", interrupt)
    assert not list(tmp_path.iterdir())


def test_a_signal_while_a_draft_is_removed_leaves_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As SIGTERM, whose handler raises SystemExit."""
    unlink, calls = Path.unlink, []

    def interrupted(path: Path, missing_ok: bool = False) -> None:
        calls.append(path)
        if len(calls) == 1:
            raise SystemExit
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", interrupted)
    with pytest.raises(SystemExit):
        create_file([tmp_path / "a.txt"], Path.touch)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_drafts_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    for name in (".a.txt.0123.part", "below/.b.png.4567.part", "mine.part", "c.txt"):
        (tmp_path / name).touch()
    remove_drafts(tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*.*")) == ["c.txt", "mine.part"]


@pytest.mark.skipif(os.name == "nt", reason="processes cannot be looked up")
def test_drafts_of_running_processes_stay(tmp_path: Path) -> None:
    drafts: list[Path] = []
    replace_file(tmp_path / "a.txt", lambda draft: (draft.touch(), drafts.append(draft)))
    other = drafts[0].with_name(drafts[0].name.replace(f"-{os.getpid()}-", f"-{os.getppid()}-"))
    other.touch()
    remove_drafts(tmp_path)
    remove_drafts(tmp_path, {"a.txt"})
    assert sorted(tmp_path.iterdir()) == sorted([other, tmp_path / "a.txt"])


def test_a_new_file_never_replaces_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [tmp_path / f"{i}.txt" for i in range(4)]
    names[0].write_text("old", "utf-8")
    assert create_file(names, lambda draft: draft.write_text("a", "utf-8")) == names[1]

    def no_links(source: Path, target: Path) -> None:
        raise OSError(errno.EPERM, "no")

    monkeypatch.setattr("os.link", no_links)
    assert create_file(names, lambda draft: draft.write_text("b", "utf-8")) == names[2]
    assert [path.read_text("utf-8") for path in names[:3]] == ["old", "a", "b"]
    assert sorted(tmp_path.iterdir()) == names[:3]


@pytest.mark.skipif(os.name == "nt", reason="processes cannot be looked up")
def test_drafts_of_dead_processes_are_removed_by_the_next_write(tmp_path: Path) -> None:
    def write(draft: Path) -> None:
        draft.touch()
        drafts.append(draft)

    drafts: list[Path] = []
    replace_file(tmp_path / "first" / "a.txt", write)
    own = f"-{os.getpid()}-"
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    of_running = drafts[0].name.replace(own, f"-{os.getppid()}-")
    for pid in (process.pid, os.getpid(), os.getppid(), 10**30):  # the second is of an earlier process of our number
        (tmp_path / drafts[0].name.replace(own, f"-{pid}-")).touch()
    (tmp_path / ".b.txt.other-1-2.part").touch()  # of another machine
    replace_file(tmp_path / "a.txt", write)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([
        of_running, ".b.txt.other-1-2.part", "a.txt", "first",
    ])  # fmt: skip


def test_a_draft_that_is_being_written_stays(tmp_path: Path) -> None:
    def write(draft: Path) -> None:
        draft.touch()
        draft.with_name(f"{draft.name[:-13]}01234567.part").touch()  # of an earlier process of our number
        remove_drafts(tmp_path)
        assert list(tmp_path.iterdir()) == ([] if os.name == "nt" else [draft])
        draft.touch()

    replace_file(tmp_path / "a.txt", write)


def test_a_missing_drive_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.path.isdir", lambda path: False)
    with pytest.raises(OSError, match=r"a\.txt .*does not exist"):
        check_room(tmp_path / "a.txt")


@pytest.mark.parametrize(("writable", "free", "fact"), [(False, 10**12, "read-only"), (True, 11_000_000, "11 MB")])
def test_no_room_is_found_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writable: bool, free: int, fact: str
) -> None:
    check_room(tmp_path / "new" / "a.txt", 1_000_001)
    monkeypatch.setattr("os.access", lambda path, mode: writable)
    monkeypatch.setattr("shutil.disk_usage", lambda path: (10**12, 0, free))
    with pytest.raises(OSError, match=fact) as raised:
        check_room(tmp_path / "new" / "a.txt", 1_000_001)
    assert tmp_path.name in str(raised.value)
    with pytest.raises(OSError, match=fact):
        write_tensors(tmp_path / "new", {"a": torch.zeros(250_001)}, {})
    assert not list(tmp_path.iterdir())
