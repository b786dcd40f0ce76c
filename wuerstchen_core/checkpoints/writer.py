"""Writes safetensors files tensor by tensor and reads them back; the file appears complete, or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import struct
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..common.atomic import check_room, replace_file
from ..common.text import check_name
from .lazy import LazyTensor
from .modelspec import HASH
from .weight_files import DTYPES

_NAMES = {dtype: name for name, dtype in DTYPES.items()}

Progress: TypeAlias = Callable[[int, int], None]  # called with the bytes written and the total


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor | LazyTensor],
    metadata: Mapping[str, str],
    progress: Progress | None = None,
) -> None:
    """Writes a safetensors file, replacing `path`. Only one tensor at a time is computed and held in memory.

    If `metadata` has a hash of the tensors (`modelspec.HASH`), it is computed.
    Raises OSError with the path and the reason, such as a full disk, and ValueError if a number does not fit its dtype
    or the name is not UTF-8.
    """
    check_name(path)
    lazy = {key: LazyTensor.of(x) for key, x in tensors.items()}
    # Wide dtypes first, as safetensors does, so that every tensor is aligned.
    ordered = dict(sorted(lazy.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])))
    check_room(path, sum(x.nbytes for x in ordered.values()))
    try:
        replace_file(path, lambda draft: _write(draft, ordered, metadata, progress or (lambda done, total: None)))
    except ValueError as error:  # from a LazyTensor
        raise ValueError(f"{path} was not written: {error}") from error


def _write(path: Path, tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str], progress: Progress) -> None:
    """Writes the tensors in this order and verifies them."""
    checksums, done, total = {}, 0, sum(x.nbytes for x in tensors.values())
    digest = hashlib.sha256()
    with path.open("wb") as file:
        file.write(_header(tensors, _hashed(metadata, digest.hexdigest())))
        for key, x in tensors.items():
            progress(done, total)
            data = tensor_bytes(x.load())
            assert len(data) == x.nbytes, key
            file.write(data)
            checksums[key] = zlib.crc32(data)
            if HASH in metadata:
                digest.update(data)
            done += x.nbytes
            del data  # frees this tensor before the next one is computed
        file.seek(0)
        file.write(_header(tensors, _hashed(metadata, digest.hexdigest())))  # of the same length
    _verify(path, checksums)
    progress(done, total)


def _hashed(metadata: Mapping[str, str], digest: str) -> dict[str, str]:
    """Returns metadata with the hash of the tensors, if it has one."""
    return {**metadata, **({HASH: f"0x{digest}"} if HASH in metadata else {})}


def _header(tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str]) -> bytes:
    content: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    offset = 0
    for key, x in tensors.items():
        end = offset + x.nbytes
        content[key] = {"dtype": _NAMES[x.dtype], "shape": list(x.shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    return struct.pack("<Q", len(encoded)) + encoded


def tensor_bytes(x: Tensor) -> memoryview:
    """Returns the bytes of a tensor in the order of its numbers."""
    flat = x.detach().cpu().contiguous()
    flat = flat.as_strided((flat.numel(),), (1,), flat.storage_offset())  # a lone number may have another stride
    return flat.view(torch.uint8).numpy().data


def _verify(path: Path, checksums: Mapping[str, int]) -> None:
    """Raises OSError unless the tensors in the file have these checksums."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            found = {key: zlib.crc32(tensor_bytes(file.get_tensor(key))) for key in file.keys()}  # noqa: SIM118
    except SafetensorError:
        found = {}
    if found != checksums:
        raise OSError(errno.EIO, "the data read back differs from the data written")
