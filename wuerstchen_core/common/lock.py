"""A lock on a folder, for one process that writes to it."""

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

from .atomic import check_room
from .text import parse_json

log = logging.getLogger(__name__)

LOCK = ".lock"
_BYTE = 1 << 30  # the locked byte, beyond the text: Windows lets nobody read what is locked
_HELD = {errno.EACCES, errno.EAGAIN, errno.EDEADLK}
_own: set[Path] = set()  # files that this process has locked, which the system would let it lock again


@contextmanager
def folder_lock(folder: Path, rank: int = 0) -> Iterator[None]:
    """Locks a folder, which it creates, while a `with` block runs. ValueError names the process that has locked it.

    Processes of one run that write to one folder lock it with different ranks. The operating system releases the lock
    when the process ends, however it ends. Where the file system has no locks, nothing is locked, and the log says so.
    """
    check_room(folder / LOCK)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / (f"{LOCK}-{rank}" if rank else LOCK)
    resolved = path.resolve()
    holder = {"pid": os.getpid(), "host": platform.node(), "command": " ".join(sys.argv)}
    if resolved in _own:  # not read from the file: closing it would release the lock
        raise _in_use(folder, holder)
    with _opened(folder, path) as file:
        file.seek(0)
        file.write(json.dumps(holder).encode())
        file.truncate()
        file.flush()
        _own.add(resolved)
        try:
            yield
        finally:
            _own.discard(resolved)
            with suppress(OSError):  # Windows removes no open file
                path.unlink()


def _opened(folder: Path, path: Path) -> BinaryIO:
    """Returns a file, open and locked. ValueError names the process that has locked it."""
    while True:
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "rb+")
        try:
            _lock(file)
        except OSError as error:
            if error.errno in _HELD:
                with file:
                    raise _in_use(folder, _read(file)) from None
            reason = error.strerror or error
            log.warning("%s cannot be locked (%s): make sure that no other process writes to it", folder, reason)
        with suppress(FileNotFoundError):
            if os.name == "nt" or os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()  # the process that had locked it has removed it meanwhile


def _lock(file: BinaryIO) -> None:
    if os.name == "nt":
        import msvcrt

        file.seek(_BYTE)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
    else:
        import fcntl

        # Unlike flock's, this lock does not pass to the processes that read the training data.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _BYTE)


def _read(file: BinaryIO) -> dict[str, Any]:
    file.seek(0)
    with suppress(ValueError):  # it is just being written
        return dict(parse_json(file.read()))
    return {}


def _in_use(folder: Path, holder: Mapping[str, Any]) -> ValueError:
    pid, host, command = (holder.get(key, "unknown") for key in ("pid", "host", "command"))
    return ValueError(
        f"{folder} is in use by process {pid} on {host} ({command}): wait until it has ended, stop it, or choose "
        "another folder"
    )
