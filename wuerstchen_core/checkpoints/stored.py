"""Tensors of a weight file, read when they are needed.

No file stays mapped: writing over a mapped file changes the weights of a loaded model, and cutting it off kills the
process. A copy costs 0.5 s per GB once, and no more resident memory.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from .lazy import LazyTensor

CHUNK = 1 << 22  # bytes that are read at once for a checksum


class Member(NamedTuple):
    """The uncompressed bytes of a file in a zip archive."""

    offset: int  # in the archive
    size: int  # bytes
    crc: int | None  # CRC-32; None if the file states none


@dataclass(frozen=True)
class StoredFile:
    """A file as it was when it was opened: its size, time of change and inode."""

    path: Path
    status: tuple[int, int, int]
    checked: set[Member] = field(default_factory=set)  # members whose checksums were right

    @classmethod
    def of(cls, path: Path) -> StoredFile:
        return cls(path, _status(path.stat()))

    @contextmanager
    def reading(self) -> Iterator[BinaryIO]:
        """Yields the file, open for reading. Raises ValueError if it has changed, before or meanwhile."""
        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            raise self._changed() from None
        with file:
            self._check(file)
            yield file
            self._check(file)

    def tensor(
        self, offset: int, shape: tuple[int, ...], dtype: torch.dtype, strides: Any = None, member: Member | None = None
    ) -> LazyTensor:
        """Returns the tensor whose bytes start at `offset`; `strides` default to those of a contiguous tensor.

        The checksum of the `member` that contains it is verified first; ValueError if it is wrong.
        """
        if strides is None:
            length = torch.Size(shape).numel()
        else:
            length = 1 + sum((side - 1) * stride for side, stride in zip(shape, strides, strict=True))
            length = length if torch.Size(shape).numel() else 0

        # The checksum of a whole member is that of the tensor's bytes; otherwise, the member is read for it first.
        is_whole = member is not None and (offset, length * dtype.itemsize) == member[:2]
        crc = member.crc if member is not None and is_whole else None

        def load() -> Tensor:
            flat = torch.empty(length, dtype=dtype, device="cpu")
            with self.reading() as file:
                if member is not None and not is_whole:
                    self._check_member(file, member)
                file.seek(offset)
                data: Any = flat.view(torch.uint8).numpy() if length else bytearray()
                read = file.readinto(data)  # type: ignore[attr-defined]
                if crc is not None and zlib.crc32(data) != crc:
                    raise self._damaged()
            if read != flat.nbytes:
                raise self._changed()
            return flat.view(shape) if strides is None else flat.as_strided(shape, strides)

        return LazyTensor(tuple(shape), dtype, load, dtype)

    def _check_member(self, file: BinaryIO, member: Member) -> None:
        if member.crc is None or member in self.checked:
            return
        file.seek(member.offset)
        crc, left = 0, member.size
        while left and (data := file.read(min(left, CHUNK))):
            crc, left = zlib.crc32(data, crc), left - len(data)
        if left or crc != member.crc:
            raise self._damaged()
        self.checked.add(member)

    def _damaged(self) -> ValueError:
        return ValueError(f"{self.path} is damaged (a tensor has another checksum than stated): download it again")

    def _check(self, file: BinaryIO) -> None:
        if _status(os.fstat(file.fileno())) != self.status:
            raise self._changed()

    def _changed(self) -> ValueError:
        return ValueError(f"{self.path} was changed or removed while it was in use: load it again when it is complete")


def _status(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_size, status.st_mtime_ns, status.st_ino
