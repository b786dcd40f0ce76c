"""Our own file format: any subset of a model's parts in one safetensors file, sizes as JSON in its metadata."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from .parts import PARTS, TEXT_ENCODER, Params, Part, State, kind_of, params_to_json

METADATA_KEY = "wuerstchen"
FORMAT = 1
FP8 = torch.float8_e4m3fn


def parse_metadata(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """A bundle's JSON out of its safetensors metadata; {} if the file is no bundle."""
    if METADATA_KEY not in metadata:
        return {}
    try:
        content = json.loads(metadata[METADATA_KEY])
    except ValueError as error:
        raise ValueError(f"the metadata of {path} is damaged ({error}): fetch the file again") from error
    if not isinstance(content, dict):
        raise ValueError(f"the metadata of {path} is damaged (no JSON object): fetch the file again")
    if content.get("format") != FORMAT:
        raise ValueError(
            f"{path} is a bundle of format {content.get('format')!r}, and this version reads format {FORMAT}: update it"
        )
    for name in ("parts", "sampling", "vocabulary"):
        if not isinstance(content.get(name, {}), dict):
            raise ValueError(f"the metadata of {path} is damaged ({name} is no JSON object): fetch the file again")
    return content


def split_bundle(state: State) -> dict[str, State] | None:
    """The parts of a bundle by name, known by its keys alone; None if the weights are no bundle's."""
    parts: dict[str, State] = {}
    for key, x in state.items():
        name, _, rest = key.partition(".")
        if name not in (*PARTS, TEXT_ENCODER):
            return None
        parts.setdefault(name, {})[rest] = x
    return parts or None


def widened(state: State) -> State:
    """Weights with bf16 in place of fp8, which is for storage alone: torch does not add in it."""
    return {key: x.to(torch.bfloat16) if x.dtype == FP8 else x for key, x in state.items()}


def save_bundle(
    path: str | os.PathLike[str],
    parts: Mapping[str, nn.Module | Part],
    metadata: Mapping[str, Any],
    dtype: torch.dtype | None = None,
    fp8: Collection[str] = (),
) -> None:
    """Write parts as one file, floating-point tensors in `dtype` (None: as they are), those named in `fp8` in e4m3.

    Two equal text towers are stored as one. The file appears complete or not at all.
    """
    path = Path(path)
    tensors: State = {}
    sizes: dict[str, dict[str, Any]] = {}
    for name, part in _merge_towers(parts).items():
        kind_of(name)
        sizes[name] = params_to_json(_params(name, part))
        for key, x in _state(part).items():
            full = f"{name}.{key}"
            tensors[full] = _stored(x, FP8 if full in fp8 else dtype)
    if not tensors:
        raise ValueError(f"there is nothing to write to {path}: give at least one of {', '.join(PARTS)}")
    content = {"version": "v2", **metadata, "format": FORMAT, "parts": sizes}
    write_tensors(path, tensors, {METADATA_KEY: json.dumps(content)})


def _state(part: nn.Module | Part) -> State:
    return part.state_dict if isinstance(part, Part) else part.state_dict()


def _params(name: str, part: nn.Module | Part) -> Params:
    params = getattr(part, "params", None)
    if params is None:
        raise ValueError(f"{name} is a {type(part).__name__} without sizes: give one of this package's networks")
    return params


def _merge_towers(parts: Mapping[str, nn.Module | Part]) -> dict[str, nn.Module | Part]:
    merged = dict(parts)
    prior, decoder = (merged.get(f"{stage}_{TEXT_ENCODER}") for stage in ("prior", "decoder"))
    if prior is not None and decoder is not None and _equal(prior, decoder):
        merged = {name: part for name, part in merged.items() if not name.endswith(TEXT_ENCODER)}
        merged[TEXT_ENCODER] = prior
    return merged


def _equal(one: nn.Module | Part, other: nn.Module | Part) -> bool:
    if one is other:
        return True
    mine, theirs = _state(one), _state(other)
    return (
        mine.keys() == theirs.keys()
        and one.params == other.params
        and all(
            x.dtype == theirs[key].dtype and x.device == theirs[key].device and torch.equal(x, theirs[key])
            for key, x in mine.items()
        )
    )


def _stored(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    x = x.detach()
    return x.to("cpu", dtype if x.is_floating_point() else None).contiguous()


def write_tensors(path: Path, tensors: State, metadata: dict[str, str]) -> None:
    """Write a safetensors file, which appears complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        draft.touch()
        mode = draft.stat().st_mode  # what the user's files have; safetensors makes a file that only its owner reads
        save_file(tensors, draft, metadata=metadata)
        draft.chmod(mode)
        with draft.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
