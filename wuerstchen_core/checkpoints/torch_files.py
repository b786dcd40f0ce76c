"""Reads PyTorch files: zip archives, or the older format; their tensors may stay in the file until they are needed."""

from __future__ import annotations

import pickle
import re
import struct
import zipfile
from argparse import Namespace
from collections import Counter
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch

from ..common.memory import is_out_of_memory
from ..common.text import printable
from ..common.versions import OLDEST_FOR_PICKLES, check_versions
from .stored import Member

_ZIP_DATA = re.compile(r".+/data/\d+")  # the bytes of a storage in a PyTorch file
# Raised by torch.load for damaged files besides UnpicklingError; found by cutting files and changing bytes.
_DAMAGE = (RuntimeError, OSError, EOFError, LookupError, ValueError, TypeError, AttributeError, AssertionError)


def broken(path: Path, reason: object) -> ValueError:
    """Returns the error for a damaged file."""
    text = printable(shorten((str(reason) or type(reason).__name__).splitlines()[0], 80))
    return ValueError(f"{path} is incomplete or damaged ({text}): download it again")


def read_torch(path: Path, members: dict[int, Member] | None = None) -> Any:
    """Returns the content of a PyTorch file, in memory. Raises ValueError as `read_weight_file`.

    With `members`, tensors are mapped where possible, and `members` gets the part of the file with each mapped storage,
    by its address.
    """
    try:
        check_versions(OLDEST_FOR_PICKLES)
    except ValueError as error:
        raise ValueError(f"{path} is a PyTorch file, for which {error}, or use a safetensors file") from None
    # Newer versions of torch choose the format by this ending, whatever the file holds, so hide the name from them.
    misnamed = path.name.endswith(".safetensors")
    allowed: Any = getattr(torch.serialization, "safe_globals", nullcontext)  # since torch 2.5
    harmless: list[Any] = [Namespace, torch.nn.ParameterDict]  # a trainer's options, old textual inversions
    sizes: dict[int, int] = {}  # of the storages in bytes, by address

    def note(storage: Any, location: str) -> Any:
        sizes.update({storage.data_ptr(): storage.nbytes()} if storage.nbytes() else {})
        return storage

    def load(**kwargs: Any) -> Any:
        with path.open("rb") as file, allowed(harmless):
            return torch.load(file if misnamed else path, weights_only=True, **kwargs)

    try:
        # PyTorch's older format is not a zip and can't be mapped.
        if members is not None and not misnamed and (stored := _stored_members(path)):
            content = load(map_location=note, mmap=True)
            shift = min(sizes, default=0) - stored[0].offset
            found = {address: Member(address - shift, size, 0) for address, size in sizes.items()}
            if [member[:2] for member in sorted(found.values())] == [member[:2] for member in stored]:
                members |= zip(sorted(found), stored, strict=True)
                return content
            sizes.clear()
        content = load(map_location=note)
        _check_zip(path, sizes.values())
        return content
    except pickle.UnpicklingError as error:
        if "GLOBAL" in str(error) or "Unsupported class" in str(error):
            raise ValueError(
                f"{path} was not opened because it holds Python objects, which can run any code: "
                "use a safetensors file, or a PyTorch file with weights only"
            ) from error
        raise broken(path, "not a PyTorch file") from error
    except (*_DAMAGE, struct.error, zipfile.BadZipFile) as error:
        if is_out_of_memory(error):
            raise
        raise broken(path, error) from error


def _stored_members(path: Path) -> list[Member]:
    """Returns the storages of a PyTorch file, in order; [] for its older format, and if any of it is compressed."""
    if not zipfile.is_zipfile(path):
        return []
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        entries = [x for x in archive.infolist() if x.file_size]
        if any(x.compress_type != zipfile.ZIP_STORED for x in entries):
            return []
        has_checksums = any(x.CRC for x in entries)  # not after torch.serialization.set_crc32_options(False)
        members = []
        for entry in entries:
            if not _ZIP_DATA.fullmatch(entry.filename):
                if has_checksums:
                    archive.read(entry)  # small; its checksum is verified
                continue
            archive.open(entry).close()  # checks its local header
            file.seek(entry.header_offset + 26)  # of the lengths of the name and extra field behind it
            start = entry.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))
            members.append(Member(start, entry.file_size, entry.CRC if has_checksums else None))
        return sorted(members)


def _check_zip(path: Path, sizes: Iterable[int]) -> None:
    """Raises BadZipFile if a checksum is wrong or no member has one of the sizes; torch checks neither of them."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        has_checksums = any(x.CRC for x in archive.infolist())
        if has_checksums and (damaged := archive.testzip()) is not None:
            raise zipfile.BadZipFile(f"{damaged} has another checksum than stated")
        if Counter(sizes) - Counter(x.file_size for x in archive.infolist()):
            raise zipfile.BadZipFile("a tensor is longer than its data")
