"""Tensors of a weight file, read when they are needed.

No file stays mapped: writing over a mapped file changes the weights of a loaded model, and cutting it off kills the
process. A copy costs 0.5 s per GB once, and no more resident memory.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from .lazy import LazyTensor


@dataclass(frozen=True)
class StoredFile:
    """A file as it was when it was opened: its size, time of change and inode."""

    path: Path
    status: tuple[int, int, int]

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

    def tensor(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype, strides: Any = None) -> LazyTensor:
        """Returns the tensor whose bytes start at `offset`; `strides` default to those of a contiguous tensor."""
        if strides is None:
            length = torch.Size(shape).numel()
        else:
            length = 1 + sum((side - 1) * stride for side, stride in zip(shape, strides, strict=True))
            length = length if torch.Size(shape).numel() else 0

        def load() -> Tensor:
            flat = torch.empty(length, dtype=dtype, device="cpu")
            with self.reading() as file:
                file.seek(offset)
                read = file.readinto(flat.view(torch.uint8).numpy()) if length else 0  # type: ignore[attr-defined]
            if read != flat.nbytes:
                raise self._changed()
            return flat.view(shape) if strides is None else flat.as_strided(shape, strides)

        return LazyTensor(tuple(shape), dtype, load, dtype)

    def _check(self, file: BinaryIO) -> None:
        if _status(os.fstat(file.fileno())) != self.status:
            raise self._changed()

    def _changed(self) -> ValueError:
        return ValueError(f"{self.path} was changed or removed while it was in use: load it again when it is complete")


def _status(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_size, status.st_mtime_ns, status.st_ino
