"""Writes files atomically: a file is either complete or missing."""

from __future__ import annotations

import errno
import os
import platform
import shutil
import sys
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache, partial
from itertools import chain
from pathlib import Path
from uuid import uuid4


def _pid_namespace() -> str:
    """Returns the name of the namespace of this process's number: containers have their own numbers."""
    with suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return ""


# Looked up by name: no system has all of them.
NO_SPACE = {getattr(errno, name, None) for name in ("ENOSPC", "EDQUOT", "EFBIG")}
# Tells apart the processes of machines and containers that share a disk.
_HOST = f"{zlib.crc32(' '.join((platform.node(), sys.platform, _pid_namespace())).encode()):08x}"
_LONGEST = 200  # bytes of a file's name in that of its draft, which may have 255 in all
_RESERVE = 10_000_000  # bytes of a disk that stay free
_NOT_ALLOWED = {getattr(errno, name, None) for name in ("EACCES", "EPERM", "EROFS", "ETXTBSY", "EBUSY")}
_own: set[str] = set()  # names of the drafts that this process is writing


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Calls `write` with a draft's path in the same folder, syncs the draft to disk and renames it to `path`.

    Creates the folder. On any error it removes the draft and leaves `path` unchanged. OSError names path and reason.
    """
    with _draft(path) as draft:
        write(draft)
        _sync(draft)
        os.replace(draft, path)


def write_text(path: Path, text: str) -> None:
    """Writes a text in UTF-8 as `replace_file`."""
    replace_file(path, partial(Path.write_text, data=text, encoding="utf-8"))


def create_file(paths: Iterable[Path], write: Callable[[Path], object]) -> Path:
    """Writes a file as `replace_file` under the first of `paths`, all in one folder, that does not exist; returns it.

    Never replaces a file, also not one that another process creates meanwhile.
    """
    candidates = iter(paths)
    first = next(candidates)
    with _draft(first) as draft:
        write(draft)
        _sync(draft)
        return next(path for path in chain([first], candidates) if _name_draft(draft, path))


def _name_draft(draft: Path, path: Path) -> bool:
    """Gives a draft a name that no file has; False if one has it."""
    try:
        os.link(draft, path)
        return True
    except FileExistsError:
        return False
    except OSError:  # a file system without links
        try:
            path.open("x").close()
        except FileExistsError:
            return False
    try:
        os.replace(draft, path)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return True


@contextmanager
def draft_of(path: Path) -> Iterator[Path]:
    """Yields the path of a draft of a file or folder, in the same folder, and removes the draft afterwards."""
    name = path.name
    while len(os.fsencode(name)) > _LONGEST:
        name = name[:-1]
    draft = path.with_name(f".{name}.{_HOST}-{os.getpid()}-{uuid4().hex[:8]}.part")
    _own.add(draft.name)
    try:
        yield draft
    finally:
        remove(draft)
        _own.discard(draft.name)


@contextmanager
def _draft(path: Path) -> Iterator[Path]:
    """Creates the folder of `path` and yields the path of its draft as `draft_of`. OSError names `path`."""
    with draft_of(path) as draft:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _remove_left_drafts(path.parent)
            yield draft
        except OSError as error:
            raise OSError(f"{path} was not written: {reason(error)}") from error


def remove(path: Path) -> None:
    """Removes a file or folder if it is there and can be removed, even if a signal interrupts that."""
    try:
        _remove(path)
    except BaseException:
        _remove(path)
        raise


def _remove(path: Path) -> None:
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


@cache
def _remove_left_drafts(folder: Path) -> None:
    """Removes the drafts in a folder that killed processes of this machine left; once, for a folder has many files."""
    for draft in folder.glob(f".*.{_HOST}-*-*.part"):
        if not _is_written(draft):
            remove(draft)


def _sync(draft: Path) -> None:
    with draft.open("rb+") as file:
        os.fsync(file.fileno())


def _is_written(draft: Path) -> bool:
    """True if the process that writes a draft runs on this machine."""
    host, pid, _ = [*draft.name.split(".")[-2].split("-"), "", ""][:3]
    if host != _HOST or not pid.isdecimal():
        return False
    if int(pid) == os.getpid():  # else of an earlier process with this number, such as 1 in a container
        return draft.name in _own
    return _is_running(int(pid))


def _is_running(pid: int) -> bool:
    """True if there is a process of this number; on Windows, which would end it instead, always."""
    if os.name == "nt":
        return True
    try:
        os.kill(pid, 0)
    except OverflowError:  # larger than any process number
        return False
    except OSError as error:
        return error.errno != errno.ESRCH
    return True


def link_file(source: Path, target: Path) -> None:
    """Makes `target` a hard link to a file, which takes no space, or a copy if the file system has no such link."""
    with _draft(target) as draft:
        try:
            os.link(source.resolve(), draft)
        except OSError:
            shutil.copyfile(source, draft)
            _sync(draft)
        os.replace(draft, target)  # does nothing if `target` is a link to the same file


def nearest_folder(path: Path) -> Path:
    """Returns `path` or the nearest folder above it that exists. OSError if there is none, as of a missing drive."""
    for folder in (path.absolute(), *path.absolute().parents):
        if os.path.isdir(folder):
            return folder
    raise OSError(f"{path} cannot be written, because {path.absolute().anchor} does not exist: choose another folder")


def check_room(path: Path, size: int = 0, what: object = "") -> None:
    """Raises OSError if a file of `size` bytes cannot be written at `path`, or files in it if it is a folder.

    It is called before work whose result would be lost. `what` is what needs the space in the message (default: path).
    """
    folder = nearest_folder(path)
    if not os.access(folder, os.W_OK):
        raise OSError(f"{path} cannot be written, because {folder} is read-only: choose another folder")
    total, _, free = shutil.disk_usage(folder)
    needed = size + _RESERVE
    if total and free < needed:  # a total of 0: the file system does not tell
        raise OSError(
            f"{what or path} needs {needed / 1e6:,.0f} MB, but the disk of {folder} has {free / 1e6:,.0f} MB free: "
            "free some space, or choose another disk"
        )


def remove_drafts(folder: Path, names: Collection[str] | None = None) -> None:
    """Removes drafts that killed processes left in a folder: those of the files `names`, or all, in subfolders too.

    Those of running processes of this machine stay, except on Windows. No other process may be writing the files.
    """
    for path in folder.rglob(".*.part") if names is None else folder.glob(".*.part"):
        if names is None or path.name[1:].rsplit(".", 2)[0] in names:
            if os.name == "nt" or not _is_written(path):
                remove(path)


def reason(error: OSError) -> str:
    """Returns the end of an error message: what went wrong and what to do."""
    if error.errno in NO_SPACE:
        return "the disk is full: free some space, or choose another disk"
    if error.errno in _NOT_ALLOWED:
        return "it is read-only or in use: close the program that uses it, or choose another name"
    return f"{(error.strerror or str(error)).lower()}: choose another name or disk"
