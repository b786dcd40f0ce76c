"""Reads the members of tar files and streams, including several archives one after another."""

from __future__ import annotations

import bz2
import gzip
import io
import itertools
import lzma
import tarfile
from collections.abc import Iterator
from typing import BinaryIO, Protocol

from .left_out import HIDDEN, LeftOut

CHUNK = 1 << 20  # bytes
OPEN = {b"\x1f\x8b": gzip.open, b"BZ": bz2.open, b"\xfd7": lzma.open}  # by the first two bytes


class Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


class ForwardFile:
    """A stream with the `seek` and `tell` that `tarfile` needs: forward, and back within the last read."""

    def __init__(self, stream: Readable):
        self._stream, self._position, self._last, self._ahead = stream, 0, b"", b""

    def tell(self) -> int:
        return self._position

    def read(self, size: int = CHUNK) -> bytes:
        parts, missing = [self._ahead[:size]], size - len(self._ahead[:size])
        self._ahead = self._ahead[size:]
        while missing > 0 and (part := self._stream.read(missing)):
            parts.append(part)
            missing -= len(part)
        self._last = b"".join(parts)
        self._position += len(self._last)
        return self._last

    def seek(self, position: int) -> int:
        if (back := self._position - position) > 0:
            self._ahead = self._last[len(self._last) - back :] + self._ahead
            self._last, self._position = b"", position
        while self._position < position and self.read(min(CHUNK, position - self._position)):
            pass
        return self._position


class FilePart(io.RawIOBase):
    """A part of a file as a file of its own."""

    def __init__(self, file: BinaryIO, offset: int, size: int):
        self._file, self._offset, self._size, self._position = file, offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = max(0, offset + (0, self._position, self._size)[whence])
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        size = min(len(buffer), self._size - self._position)
        if size <= 0:
            return 0
        self._file.seek(self._offset + self._position)
        data = self._file.read(size)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


def open_stream(stream: Readable) -> ForwardFile:
    """Returns the contents of a stream of a tar file, which may be compressed by gzip, bzip2 or xz."""
    file = ForwardFile(stream)
    magic = file.read(2)
    file.seek(0)
    return ForwardFile(OPEN[magic](file)) if magic in OPEN else file  # type: ignore[operator]


def read_members(file: BinaryIO | ForwardFile, left_out: LeftOut) -> Iterator[tuple[int, tarfile.TarInfo]]:
    """Yields the files in a tar file, and in further archives behind its end, each with the archive's number from 0.

    Hidden members, links and sparse files are counted in `left_out`. Raises tarfile.TarError if the file is damaged or
    its end mark is missing.
    """
    for number in itertools.count():
        with tarfile.open(fileobj=file, mode="r:") as tar:  # type: ignore[call-overload]
            for member in tar:
                hidden = is_hidden(member.name)
                if member.isreg() and not member.issparse() and not hidden:
                    yield number, member
                elif not member.isdir():
                    left_out.add("hidden files" if hidden else "links and sparse files", member.name)
                tar.members.clear()
            file.seek(tar.offset)
        block = file.read(tarfile.BLOCKSIZE)
        if len(block) < tarfile.BLOCKSIZE or any(block):
            raise tarfile.ReadError("the end mark of a tar file is missing")
        start = file.tell()
        while (block := file.read(tarfile.BLOCKSIZE)) and not any(block):
            start = file.tell()
        if not block:
            return
        file.seek(start)


def is_hidden(name: str) -> bool:
    """True for members that systems add: ._NAME, .DS_Store, __MACOSX, PaxHeader."""
    return any(HIDDEN.fullmatch(part) and part not in (".", "..") for part in name.split("/"))
