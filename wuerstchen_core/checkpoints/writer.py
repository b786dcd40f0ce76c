"""The one writer of safetensors files: tensor by tensor, read back from the disk, and there whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .lazy import Planned, as_it_is
from .weight_files import DTYPES

_NAMES = {dtype: name for name, dtype in DTYPES.items()}

# By name, since not every system has each.
_FULL = {getattr(errno, name, None) for name in ("ENOSPC", "EDQUOT", "EFBIG")}
_HELD = {getattr(errno, name, None) for name in ("EACCES", "EPERM", "EROFS", "ETXTBSY", "EBUSY")}
_UNKNOWN = {getattr(errno, name, None) for name in ("EINVAL", "EOPNOTSUPP", "ENOSYS")}

Progress: TypeAlias = Callable[[int, int], None]  # bytes written, bytes in all


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor | Planned],
    metadata: Mapping[str, str],
    progress: Progress | None = None,
) -> None:
    """Write a safetensors file over whatever stands at `path`; it appears complete and checked, or not at all.

    OSError says in one sentence what the disk did not allow.
    """
    planned = {key: as_it_is(x) if isinstance(x, Tensor) else x for key, x in tensors.items()}
    # Wide numbers first, as safetensors itself does it: then each tensor lies where its numbers may lie.
    ordered = dict(sorted(planned.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])))
    header = _header(ordered, metadata)
    size = len(header) + sum(x.size for x in ordered.values())
    draft = path.with_name(f".{path.name}.{os.getpid()}.part")
    with _in_words(path, size):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with draft.open("wb") as file:
                _reserve(file, size)
                file.write(header)
                sums = _write(file, ordered, progress or (lambda done, total: None))
                file.flush()
                os.fsync(file.fileno())
                _forget(file)
            _check(draft, sums)
            os.replace(draft, path)
        finally:
            draft.unlink(missing_ok=True)


def _header(tensors: Mapping[str, Planned], metadata: Mapping[str, str]) -> bytes:
    content: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for key, x in tensors.items():
        content[key] = {
            "dtype": _NAMES[x.dtype],
            "shape": list(x.shape),
            "data_offsets": [offset, offset + x.size],
        }
        offset += x.size
    encoded = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    return struct.pack("<Q", len(encoded)) + encoded


def _write(file: BinaryIO, tensors: Mapping[str, Planned], progress: Progress) -> dict[str, int]:
    """Write the tensors; returns their checksums."""
    sums, done, total = {}, 0, sum(x.size for x in tensors.values())
    for key, x in tensors.items():
        progress(done, total)
        sums[key] = _write_one(file, key, x)
        done += x.size
    progress(done, total)
    return sums


def _write_one(file: BinaryIO, key: str, x: Planned) -> int:
    """Make a tensor and write it; returns its checksum, and leaves nothing in memory while the next is made."""
    made = x.make()
    assert made.dtype == x.dtype and tuple(made.shape) == x.shape, key
    data = _bytes(made)
    file.write(data)
    return zlib.crc32(data)


def _bytes(x: Tensor) -> memoryview:
    return x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _reserve(file: BinaryIO, size: int) -> None:
    """Take the room on the disk at once, where the system can: a full disk shows before the work, not after it."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            if error.errno not in _UNKNOWN:
                raise


def _forget(file: BinaryIO) -> None:
    """Let what is read next come from the disk and not from memory, where the system can."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _check(path: Path, sums: Mapping[str, int]) -> None:
    """Compare what stands on the disk with what was written."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            found = {key: zlib.crc32(_bytes(file.get_tensor(key))) for key in file.keys()}  # noqa: SIM118
    except SafetensorError:
        found = {}
    if found != dict(sums):
        raise OSError(errno.EIO, "it reads back other than it was written")


@contextmanager
def _in_words(path: Path, size: int) -> Iterator[None]:
    """Say in one sentence what the disk did not allow."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            why = f"there is no room for its {size / 1e9:.2f} GB: free some, or choose another disk"
        elif error.errno in _HELD:
            why = "it is read-only or in use: close what uses it, or choose another name"
        elif error.errno == errno.EFAULT:  # in a file that is mapped
            why = "what goes into it can no longer be read: look whether the files it comes from are whole"
        else:
            why = f"{(error.strerror or str(error)).lower()}: choose another name or disk"
        raise OSError(f"{path} was not written, {why}") from error
