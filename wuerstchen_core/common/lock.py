"""Locks on folders and files, for one process that writes them."""

from __future__ import annotations

import errno
import json
import logging
import os
import platform
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from .atomic import check_room, reason, remove
from .text import parse_json

log = logging.getLogger(__name__)

LOCK = ".lock"
_BYTE = 1 << 30  # the locked byte, beyond the text: Windows lets nobody read what is locked
_TRIES = 20  # of a file that other processes remove meanwhile
_HELD = {errno.EACCES, errno.EAGAIN, errno.EDEADLK}
_own: set[Path] = set()  # files that this process has locked, which the system would let it lock again


@contextmanager
def folder_lock(folder: Path, rank: int = 0) -> Iterator[None]:
    """Locks a folder, which it creates, while a `with` block runs. ValueError names the process that has locked it.

    Processes of one run that write to one folder lock it with different ranks. The operating system releases the lock
    when the process ends, however it ends. Where the file system has no locks, nothing is locked, and the log says so.
    """
    check_room(folder)
    with _locked(folder, folder / (f"{LOCK}-{rank}" if rank else LOCK)):
        yield


@contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Locks a file, which need not exist, and creates its folder, as `folder_lock` does a folder."""
    check_room(path)
    with _locked(path, path.with_name(f".{path.name}{LOCK}")):
        yield


@contextmanager
def _locked(target: Path, path: Path) -> Iterator[None]:
    """Locks the file `path`. ValueError names the process that has locked it, and `target`, which it is writing."""
    resolved = path.resolve()
    holder = {"pid": os.getpid(), "host": platform.node(), "command": " ".join(sys.argv)}
    if resolved in _own:  # not read from the file: closing it would release the lock
        raise _in_use(target, holder)
    with _opened(target, path) as file:
        _own.add(resolved)
        try:
            _write(file, target, holder)
            yield
        finally:
            _own.discard(resolved)
            if os.name == "nt":  # which removes no open file; elsewhere another process could lock what is removed
                file.close()
            remove(path)


def _opened(target: Path, path: Path) -> BinaryIO:
    """Returns a file, open and locked. ValueError names the process that has locked it, OSError says what failed."""
    tries = 0
    while True:
        tries += 1
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "rb+")
        except OSError as error:
            if tries < _TRIES and not os.path.exists(path.parent):  # another process has removed it meanwhile
                continue
            raise OSError(f"{target} was not locked: {reason(error)}") from error
        try:
            _lock(file)
        except OSError as error:
            if error.errno in _HELD:
                with file:
                    raise _in_use(target, _read(file)) from None
            _warn(target, error.strerror or error)
            return file
        with suppress(FileNotFoundError):
            if os.name == "nt" or os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        if tries == _TRIES:
            _warn(target, "the file system gives no lasting file numbers")
            return file
        file.close()  # the process that had locked it has removed it meanwhile


def _warn(target: Path, why: object) -> None:
    log.warning("%s cannot be locked (%s): make sure that no other process writes to it", target, why)


def is_empty(folder: Path) -> bool:
    """True if there is nothing in a folder but its lock."""
    return all(path.name == LOCK for path in folder.iterdir())


def _lock(file: BinaryIO) -> None:
    if os.name == "nt":
        import msvcrt

        file.seek(_BYTE)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
    else:
        import fcntl

        # Unlike flock's, this lock does not pass to the processes that read the training data.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _BYTE)


def _write(file: BinaryIO, target: Path, holder: Mapping[str, Any]) -> None:
    file.seek(0)
    file.truncate()
    try:
        os.write(file.fileno(), json.dumps(holder).encode())
    except OSError as error:
        raise OSError(f"{target} was not locked: {reason(error)}") from error


def _read(file: BinaryIO) -> dict[str, Any]:
    file.seek(0)
    with suppress(ValueError):  # it is just being written
        return dict(parse_json(file.read()))
    return {}


def _in_use(target: Path, holder: Mapping[str, Any]) -> ValueError:
    pid, host, command = (holder.get(key, "unknown") for key in ("pid", "host", "command"))
    return ValueError(
        f"{target} is in use by process {pid} on {host} ({command}): wait until it has ended, stop it, or choose "
        "another output"
    )
