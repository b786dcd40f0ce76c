"""Writes files atomically: a file is either complete or missing."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Collection
from contextlib import suppress
from functools import partial
from pathlib import Path
from uuid import uuid4

# Looked up by name: no system has all of them.
NO_SPACE = {getattr(errno, name, None) for name in ("ENOSPC", "EDQUOT", "EFBIG")}
_NOT_ALLOWED = {getattr(errno, name, None) for name in ("EACCES", "EPERM", "EROFS", "ETXTBSY", "EBUSY")}


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Calls `write` with a draft's path in the same folder, syncs the draft to disk and renames it to `path`.

    Creates the folder. On any error it removes the draft and leaves `path` unchanged. OSError names path and reason.
    """
    draft = path.with_name(f".{path.name}.{uuid4().hex[:12]}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(draft)
        with draft.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(draft, path)
    except OSError as error:
        raise OSError(f"{path} was not written: {reason(error)}") from error
    finally:
        with suppress(OSError):  # if the folder itself is missing or locked
            draft.unlink()


def link_file(source: Path, target: Path) -> None:
    """Makes `target` a hard link to a file, which takes no space, or a copy if the file system has no such link."""
    draft = target.with_name(f".{target.name}.{uuid4().hex[:12]}.part")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), draft)
    except OSError:
        replace_file(target, partial(shutil.copyfile, source))
    else:
        os.replace(draft, target)
        draft.unlink(missing_ok=True)  # it stays if `target` was a link to the same file


def remove_drafts(folder: Path, names: Collection[str] | None = None) -> None:
    """Removes drafts that killed processes left in a folder: those of the files `names`, or all, in subfolders too.

    No other process may be writing the files.
    """
    for path in folder.rglob(".*.part") if names is None else folder.glob(".*.part"):
        if names is None or path.name[1:].rsplit(".", 2)[0] in names:
            path.unlink(missing_ok=True)


def reason(error: OSError) -> str:
    """Returns the end of an error message: what went wrong and what to do."""
    if error.errno in NO_SPACE:
        return "the disk is full: free some space, or choose another disk"
    if error.errno in _NOT_ALLOWED:
        return "it is read-only or in use: close the program that uses it, or choose another name"
    return f"{(error.strerror or str(error)).lower()}: choose another name or disk"
