"""Files appear whole or not at all."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from wuerstchen_core.common.atomic import remove_drafts, replace_file


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


def test_drafts_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    for name in (".a.txt.0123.part", "below/.b.png.4567.part", "mine.part", "c.txt"):
        (tmp_path / name).touch()
    remove_drafts(tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*.*")) == ["c.txt", "mine.part"]
