"""Reads weight files: safetensors and PyTorch's, which differ in their first bytes."""

from __future__ import annotations

import json
import pickle
import re
import struct
import zipfile
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .components import State
from .file_kinds import is_safetensors, name_kind

# Names of a training save's contents that are no weights.
_NO_WEIGHTS = re.compile(r"optim|scheduler|scaler|loops|hparams|hyper_parameters|args|rng|config", re.IGNORECASE)
_DEPTH = 3  # of dictionaries in one another
# Small tensors that say what others mean.
_DESCRIBING = re.compile(r"(?:\.rows|comfy_quant|weight_scale|scale_weight)$")

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

# Raised by torch.load for damaged files besides UnpicklingError; found by cutting files and changing bytes.
_DAMAGE = (RuntimeError, OSError, EOFError, LookupError, ValueError, TypeError, AttributeError, AssertionError)


@dataclass(frozen=True)
class WeightFile:
    """State dicts of a file by the dotted keys that hold them ("" if bare), and a safetensors file's metadata."""

    states: dict[str, State]
    metadata: dict[str, str]


def read_weight_file(path: Path, headers_only: bool = False) -> WeightFile:
    """Reads a file, memory-mapped where possible. With `headers_only`, tensors of a safetensors file have no data.

    Raises ValueError if it is not a weight file, is damaged, or holds Python objects that could run code.
    """
    if kind := name_kind(path):
        raise ValueError(f"{path} {kind}")
    if is_safetensors(path):
        with _open_safetensors(path) as content:
            state = {
                key: _header(content, key) if headers_only and not _DESCRIBING.search(key) else content.get_tensor(key)
                for key in content.keys()
            }
            return WeightFile({"": state}, content.metadata() or {})
    with path.open("rb") as file:
        start = file.read(2)
    if start == b"PK" or start[:1] == b"\x80":
        return WeightFile(_states(path, read_torch(path)), {})
    raise ValueError(
        f"{path} is not a safetensors or PyTorch file: it may be an incomplete download; download it again"
    )


def read_file_metadata(path: Path) -> dict[str, str]:
    """Returns a safetensors file's metadata; {} for other files."""
    if not is_safetensors(path):
        return {}
    with _open_safetensors(path) as content:
        return content.metadata() or {}


@contextmanager
def _open_safetensors(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except SafetensorError as error:
        raise _broken(path, error) from error


def _broken(path: Path, reason: object) -> ValueError:
    text = shorten((str(reason) or type(reason).__name__).splitlines()[0], 80)
    return ValueError(f"{path} is incomplete or damaged ({text}): download it again")


def _header(file: Any, key: str) -> Tensor:
    """Returns a tensor of a safetensors file on the meta device."""
    tensor = file.get_slice(key)
    return torch.empty(tensor.get_shape(), dtype=DTYPES.get(tensor.get_dtype(), torch.uint8), device="meta")


def read_torch(path: Path) -> Any:
    """Returns the content of a PyTorch file, memory-mapped where possible. Raises ValueError as `read_weight_file`."""
    # Newer versions of torch choose the format by this ending, whatever the file holds, so hide the name from them.
    misnamed = path.name.endswith(".safetensors")
    mapped = zipfile.is_zipfile(path) and not misnamed  # PyTorch's older format is not a zip and can't be mapped
    allowed: Any = getattr(torch.serialization, "safe_globals", nullcontext)  # since torch 2.5
    harmless: list[Any] = [Namespace, torch.nn.ParameterDict]  # a trainer's options, old textual inversions
    try:
        with path.open("rb") as file, allowed(harmless):
            return torch.load(file if misnamed else path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        if "GLOBAL" in str(error) or "Unsupported class" in str(error):
            raise ValueError(
                f"{path} was not opened because it holds Python objects, which can run any code: "
                "use a safetensors file, or a PyTorch file with weights only"
            ) from error
        raise _broken(path, "not a PyTorch file") from error
    except (*_DAMAGE, struct.error) as error:
        raise _broken(path, error) from error


def _states(path: Path, content: Any) -> dict[str, State]:
    """Returns the state dicts in a PyTorch file's content."""
    states = dict(_find_states(content, ""))
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
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise _broken(path, error) from error
    if not isinstance(content, dict):
        raise _broken(path, "not a JSON object")
    return content
