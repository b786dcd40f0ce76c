"""This project's file format: parts of a model in one safetensors file, with their params as JSON in its metadata."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ..common.text import parse_json
from .components import PARTS, TEXT_ENCODER, TOWERS, Part, State, component
from .dequant import part_state
from .lazy import LazyTensor, apply_to_rows
from .modelspec import spec_header
from .quant import quantize
from .release import only_release, release_of
from .writer import Progress, write_tensors

DtypeOf: TypeAlias = Callable[[str, str, LazyTensor], torch.dtype | None]  # called with a part's name, a key, a tensor
AnyPart: TypeAlias = nn.Module | Part

METADATA_KEY = "wuerstchen"
FORMAT = 1
RELEASES = ("v1", "v2")
TABLE = "token_embedding"  # a small model uses a few hundred of its 49408 rows


def parse_metadata(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """Returns a bundle's JSON from its safetensors metadata; {} if the file is not a bundle.

    Raises ValueError if it is damaged or of an unknown format.
    """
    if METADATA_KEY not in metadata:
        return {}
    try:
        content = parse_json(metadata[METADATA_KEY])
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise ValueError(f"the metadata of {path} is damaged: download the file again")
    if content.get("format") != FORMAT:
        raise ValueError(
            f"{path} is a bundle of format {content.get('format')!r}, but this version reads format {FORMAT}: "
            "update this package"
        )
    for name in ("parts", "sampling", "vocabulary"):
        if not isinstance(content.get(name, {}), dict):
            raise ValueError(f"the metadata of {path} is damaged ({name} is not an object): download the file again")
    for name, kind in {"words": str, "larger": int}.items():
        values = content.get("vocabulary", {}).get(name, [])
        if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
            raise ValueError(f"the metadata of {path} is damaged ({name} is not a list): download the file again")
    if content.get("version", "v2") not in RELEASES:
        raise ValueError(
            f"{path} is of the release {content['version']!r}, not {' or '.join(RELEASES)}: update this package"
        )
    return content


def split_bundle(state: State) -> dict[str, State] | None:
    """Returns the parts of a bundle by name; None if the keys are not a bundle's."""
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
    *,
    bare: bool = False,
) -> None:
    """Writes parts as one file, floating-point tensors in `dtype` (None: unchanged; fp8 and int8: see `quant`).

    Two equal text towers are stored once. `bare` writes a single part's keys without its name, as other programs
    expect them. The file appears complete, or OSError gives the reason.
    """
    tensors: dict[str, LazyTensor] = {}
    params: dict[str, Any] = {}
    for name, part in merge_towers(parts).items():
        to_ours = component(name).to_ours
        params[name] = part.params
        for key, x in to_ours(tensors_of(part)).items():
            chosen = dtype(name, key, x) if callable(dtype) else dtype
            tensors |= quantize(key if bare else f"{name}.{key}", x, chosen)
    if not tensors:
        raise ValueError(f"no part to write to {path}: give at least one of {', '.join(PARTS)}")
    release = only_release(map(release_of, params.values()))
    content = {
        **({"version": release} if release else {}),
        **metadata,
        "format": FORMAT,
        "parts": {name: asdict(p) for name, p in params.items()},
    }
    header = spec_header(params, content, content.get("version"))
    write_tensors(Path(path), tensors, {METADATA_KEY: json.dumps(content), **header}, progress)


def tensors_of(part: AnyPart) -> dict[str, LazyTensor]:
    """Returns the weights of a network or a Part, with those of int8 layers restored (`part_state`)."""
    return part_state(part.state_dict if isinstance(part, Part) else part.state_dict())


def merge_towers(parts: Mapping[str, AnyPart]) -> dict[str, AnyPart]:
    """Returns the parts with two equal text towers as one, named `text_encoder`."""
    prior, decoder = (parts.get(name) for name in TOWERS)
    if prior is None or decoder is None or not _equal(prior, decoder):
        return dict(parts)
    return {**{name: part for name, part in parts.items() if name not in TOWERS}, TEXT_ENCODER: prior}


def _equal(one: AnyPart, other: AnyPart) -> bool:
    a, b = tensors_of(one), tensors_of(other)
    alike = one.params == other.params and a.keys() == b.keys()
    return one is other or (alike and all(_same(x, b[key]) for key, x in a.items()))


def _same(one: LazyTensor, other: LazyTensor) -> bool:
    return one is other or (one.dtype == other.dtype and one.load().cpu().equal(other.load().cpu()))


def restore_token_rows(state: dict[str, LazyTensor], params: Mapping[str, Any] | None) -> dict[str, LazyTensor]:
    """Restores a token embedding of which a bundle stores only the trained rows; all others become zeros.

    Beside the shortened `weight` [n, c], `rows` [n] holds their indices. `params` are those of the bundle's metadata.
    Raises ValueError if these lack the vocabulary size, or an index is out of range.
    """
    if f"{TABLE}.rows" not in state:
        return state
    total = (params or {}).get("vocab_size")
    if not isinstance(total, int):
        raise ValueError("the metadata lacks vocab_size, the length of the token embedding: download the file again")
    state = dict(state)
    rows, stored = state.pop(f"{TABLE}.rows").load(), state.get(f"{TABLE}.weight")
    indices = rows.dtype in (torch.int64, torch.int32) and rows.ndim == 1 and rows.numel()
    if stored is None or len(stored.shape) != 2 or not indices or len(rows) != stored.shape[0]:
        raise ValueError(f"the rows of {TABLE} are damaged: download the file again")
    if not 0 <= int(rows.min()) <= int(rows.max()) < total:
        raise ValueError(f"the rows of {TABLE} are damaged: download the file again")

    def restore(stored: Tensor) -> Tensor:
        table = torch.zeros(total, stored.shape[1], device=stored.device).to(stored.dtype)
        table.view(torch.uint8)[rows.long()] = stored.view(torch.uint8)  # torch can't index-assign fp8
        return table

    state[f"{TABLE}.weight"] = apply_to_rows(restore, stored, rows=total)
    return state
