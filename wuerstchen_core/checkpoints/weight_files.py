"""Reads weight files: safetensors and PyTorch's, which differ in their first bytes."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..common.files import check_file, read_text_file
from ..common.text import check_name, parse_json, printable
from .components import State
from .damage import names_source
from .file_kinds import is_safetensors, name_kind
from .lazy import LazyTensor
from .stored import Member, StoredFile
from .torch_files import broken, read_torch

LazyState: TypeAlias = dict[str, LazyTensor]

# Names of a training save's contents that are no weights.
_NO_WEIGHTS = re.compile(r"optim|scheduler|scaler|loops|hparams|hyper_parameters|args|rng|config", re.IGNORECASE)
_DEPTH = 3  # of dictionaries in one another

DTYPES = {  # by their names in safetensors
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
# Not in every version of torch.
DTYPES |= {
    name: getattr(torch, dtype)
    for name, dtype in (("U16", "uint16"), ("U32", "uint32"), ("U64", "uint64"), ("F8_E8M0", "float8_e8m0fnu"))
    if hasattr(torch, dtype)
}


@dataclass(frozen=True)
class WeightFile:
    """State dicts of a file by the dotted keys that hold them ("" if bare), and a safetensors file's metadata."""

    states: dict[str, LazyState]
    metadata: dict[str, str]


@names_source
def read_weight_file(path: Path) -> WeightFile:
    """Opens a file, whose tensors are read when they are loaded; then ValueError if the file has changed since.

    Raises ValueError if it is not a weight file, is damaged, or holds Python objects that could run code.
    """
    check_file(path)
    check_name(path)
    if kind := name_kind(path):
        raise ValueError(f"{path} {kind}")
    stored = StoredFile.of(path)
    if is_safetensors(path):
        metadata = read_file_metadata(path)  # checks the header
        return WeightFile({"": _safetensors_state(stored)}, metadata)
    with path.open("rb") as file:
        start = file.read(2)
    if start == b"PK" or start[:1] == b"\x80":
        members: dict[int, Member] = {}
        with stored.reading():
            content = read_torch(path, members)
        return WeightFile(_states(path, content, stored, members), {})
    raise ValueError(
        f"{path} is not a safetensors or PyTorch file: it may be an incomplete download; download it again"
    )


def read_file_metadata(path: Path) -> dict[str, str]:
    """Returns a safetensors file's metadata; {} for other files."""
    check_file(path)
    if not is_safetensors(path):
        return {}
    check_name(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return file.metadata() or {}
    except SafetensorError as error:
        raise broken(path, error) from error


def _safetensors_state(stored: StoredFile) -> LazyState:
    """Returns the tensors of a safetensors file with a valid header."""
    with stored.reading() as file:
        [length] = struct.unpack("<Q", file.read(8))
        header = parse_json(file.read(length))
    header.pop("__metadata__", None)
    return {
        key: stored.tensor(8 + length + x["data_offsets"][0], tuple(x["shape"]), DTYPES.get(x["dtype"], torch.uint8))
        for key, x in header.items()
    }


def check_plain(path: Path, key: str, x: Tensor) -> None:
    """Raises ValueError for a tensor that does not hold all its numbers: a sparse, quantized or meta tensor."""
    if x.layout != torch.strided or x.is_quantized or x.is_meta:
        raise ValueError(f"{path} holds {printable(key)} as a sparse, quantized or meta tensor: save it as a plain one")


def _states(path: Path, content: Any, stored: StoredFile, members: Mapping[int, Member]) -> dict[str, LazyState]:
    """Returns the state dicts in a PyTorch file's content, of which the storages in `members` are mapped."""

    def unmapped(key: str, x: Tensor) -> LazyTensor:
        check_plain(path, key, x)
        member = members.get(x.untyped_storage().data_ptr())
        if member is None:
            return LazyTensor.of(x.clone() if members else x)
        start = member.offset + int(x.storage_offset()) * x.itemsize
        return stored.tensor(start, tuple(x.shape), x.dtype, x.stride(), member)

    found = _find_states(content, "")
    states = {label: {key: unmapped(key, x) for key, x in state.items()} for label, state in found}
    if not states and isinstance(content, dict) and "shadow_params" in content:
        raise ValueError(
            f"{path} holds averaged weights without their names (shadow_params): use the network's own file"
        )
    if not states:
        raise ValueError(f"{path} holds no weights: expected a state dict, bare or under a key such as state_dict")
    return states


def _find_states(content: Any, label: str) -> Iterator[tuple[str, State]]:
    """Yields the state dicts in nested dictionaries with their dotted keys, without those of optimizers."""
    if not isinstance(content, dict):
        return
    state = {key: x for key, x in content.items() if isinstance(key, str) and isinstance(x, Tensor)}
    numbers = {key: x for key, x in content.items() if str(key).endswith(".alpha") and isinstance(x, int | float)}
    state |= {key: torch.tensor(float(x)) for key, x in numbers.items()}  # of LoRAs
    if any("." in key for key in state) or (state and len(state) == len(content) and not label):
        yield label, state
    if label.count(".") + bool(label) < _DEPTH:
        for key, value in content.items():
            if isinstance(key, str) and not _NO_WEIGHTS.search(key):
                yield from _find_states(value, f"{label}.{key}" if label else key)


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON file with one object. Raises ValueError for anything else."""
    data = read_text_file(path)
    try:
        content = parse_json(data.decode("utf-8-sig"))
    except ValueError as error:
        raise broken(path, error) from error
    if not isinstance(content, dict):
        raise broken(path, "not a JSON object")
    return content
