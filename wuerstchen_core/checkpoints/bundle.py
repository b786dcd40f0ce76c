"""Our own file format: any subset of a model's parts in one safetensors file, sizes as JSON in its metadata."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn

from .components import PARTS, TEXT_ENCODER, Params, Part, PlannedPart, State, kind_of, params_to_json
from .lazy import Planned, all_as_they_are
from .quant import planned
from .release import of_others, told_by
from .writer import Progress, write_tensors

DtypeOf: TypeAlias = Callable[[str, str, Planned], torch.dtype | None]  # of a part's name, a key in it and its tensor
AnyPart: TypeAlias = nn.Module | Part | PlannedPart

METADATA_KEY = "wuerstchen"
FORMAT = 1


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


def save_bundle(
    path: str | os.PathLike[str],
    parts: Mapping[str, AnyPart],
    metadata: Mapping[str, Any],
    dtype: torch.dtype | None | DtypeOf = None,
    progress: Progress | None = None,
) -> None:
    """Write parts as one file, floating-point tensors in `dtype` (None: as they are; fp8: see `precision`).

    Two equal text towers are stored as one. The file appears complete or not at all; OSError says why not.
    """
    path = Path(path)
    tensors: dict[str, Planned] = {}
    sizes: dict[str, dict[str, Any]] = {}
    for name, part in merge_towers(parts).items():
        kind_of(name)
        sizes[name] = params_to_json(_params(name, part))
        for key, x in _tensors(part).items():
            tensors |= planned(f"{name}.{key}", x, _wanted(dtype, name, key, x))
    if not tensors:
        raise ValueError(f"there is nothing to write to {path}: give at least one of {', '.join(PARTS)}")
    told = _release(_params(name, part) for name, part in parts.items())
    content = {**told, **metadata, "format": FORMAT, "parts": sizes}
    write_tensors(path, tensors, {METADATA_KEY: json.dumps(content)}, progress)


def save_part(
    path: str | os.PathLike[str],
    part: PlannedPart,
    metadata: Mapping[str, Any],
    dtype: torch.dtype | None | DtypeOf = None,
    progress: Progress | None = None,
) -> None:
    """Write one part as a file of its own, its keys bare, so that other programs which know them read it too."""
    tensors: dict[str, Planned] = {}
    for key, x in part.tensors.items():
        tensors |= planned(key, x, _wanted(dtype, part.name, key, x))
    content = {
        **_release([part.params]),
        **metadata,
        "format": FORMAT,
        "parts": {part.name: params_to_json(part.params)},
    }
    write_tensors(Path(path), tensors, {METADATA_KEY: json.dumps(content)}, progress)


def _wanted(dtype: torch.dtype | None | DtypeOf, name: str, key: str, x: Planned) -> torch.dtype | None:
    return dtype if dtype is None or isinstance(dtype, torch.dtype) else dtype(name, key, x)


def _release(sizes: Iterable[Params]) -> dict[str, str]:
    """What the metadata say of the release: nothing of parts that v1 and v2 share."""
    told = of_others(map(told_by, sizes))
    return {} if told is None else {"version": told}


def _tensors(part: AnyPart) -> dict[str, Planned]:
    if isinstance(part, PlannedPart):
        return part.tensors
    return all_as_they_are(part.state_dict if isinstance(part, Part) else part.state_dict())


def _params(name: str, part: AnyPart) -> Params:
    params = getattr(part, "params", None)
    if params is None:
        raise ValueError(f"{name} is a {type(part).__name__} without sizes: give one of this package's networks")
    return params


def merge_towers(parts: Mapping[str, AnyPart]) -> dict[str, AnyPart]:
    """Parts with two equal text towers as one, named `text_encoder`."""
    merged = dict(parts)
    prior, decoder = (merged.get(f"{stage}_{TEXT_ENCODER}") for stage in ("prior", "decoder"))
    if prior is not None and decoder is not None and _equal(prior, decoder):
        merged = {name: part for name, part in merged.items() if not name.endswith(TEXT_ENCODER)}
        merged[TEXT_ENCODER] = prior
    return merged


def _equal(one: AnyPart, other: AnyPart) -> bool:
    if one is other:
        return True
    mine, theirs = _tensors(one), _tensors(other)
    if mine.keys() != theirs.keys() or one.params != other.params:
        return False
    return mine is theirs or all(_same(x, theirs[key]) for key, x in mine.items())


def _same(one: Planned, other: Planned) -> bool:
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    mine, theirs = one.make(), other.make()
    return mine.device == theirs.device and torch.equal(mine, theirs)
