"""What a source holds, told from headers alone where the format has them."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from ..models.decoder import DecoderParams
from ..models.image_encoder import EFFICIENTNET_V2_L, EFFICIENTNET_V2_S, ImageEncoderParams
from ..models.prior import PriorParams
from .parts import PARTS, TEXT_ENCODER, Params, Part, params_to_json, text_width, tower_name
from .read import Source, open_source

_DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64"}
_WHY = {"image_encoder": "only pictures as input need it"}


@dataclass(frozen=True)
class PartInfo:
    """One part: how many parameters (buffers not counted), stored how, and of which sizes."""

    name: str
    parameters: int
    dtype: str
    sizes: dict[str, Any]


@dataclass(frozen=True)
class Description:
    """A source in words: `version` is "v1", "v2" or what both share; `missing` are the parts to paint that it lacks."""

    source: str
    kind: str
    version: str
    parts: tuple[PartInfo, ...]
    text_towers: dict[str, str]  # what the prior and the decoder must be given
    missing: tuple[str, ...]
    refused: tuple[str, ...]  # what else the source holds, and why it is not loaded
    vocabulary: int | None  # how many words the model knows, if they are limited
    licence: str | None

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    def lines(self) -> list[str]:
        """A report to read."""
        out = [f"{self.source}: {self.kind}, {self.version}"]
        for part in self.parts:
            sizes = ", ".join(f"{key} {value}" for key, value in part.sizes.items() if key not in ("dropout", "stages"))
            out.append(f"  {part.name}: {part.parameters:,} parameters, {part.dtype} ({sizes})")
        out += [f"  the {name} reads the text through {tower}" for name, tower in self.text_towers.items()]
        out += [f"  it also holds {other}" for other in self.refused]
        if self.vocabulary is not None:
            out.append(f"  it knows {self.vocabulary} words")
        if self.licence:
            out.append(f"  licence: {self.licence}")
        missing = [f"{name} ({_WHY[name]})" if name in _WHY else name for name in self.missing]
        out.append(f"  missing for a complete model: {', '.join(missing)}" if missing else "  complete")
        return out


def describe(source: str | os.PathLike[str]) -> Description:
    """Tell what a source holds; ValueError (as `read_part`) if it holds nothing of Würstchen."""
    content = open_source(source, headers_only=True)
    parts = {name: content.part(name) for name in PARTS if name in content.networks}
    missing = tuple(name for name in PARTS if name not in parts)
    prior, decoder = (parts.get(f"{stage}_{TEXT_ENCODER}") for stage in ("prior", "decoder"))
    if prior is not None and decoder is not None and prior.state_dict is decoder.state_dict:
        parts = {name: part for name, part in parts.items() if not name.endswith(TEXT_ENCODER)}
        parts[TEXT_ENCODER] = replace(prior, name=TEXT_ENCODER)
    words = content.metadata.get("vocabulary", {}).get("words")
    widths = {name: width for name, part in parts.items() if (width := text_width(part.params)) is not None}
    return Description(
        source=str(source),
        kind=_kind(content),
        version=_version(content, parts),
        parts=tuple(_part_info(part) for part in parts.values()),
        text_towers={name: tower_name(width) for name, width in widths.items()},
        missing=missing,
        refused=content.refused,
        vocabulary=None if words is None else len(words),
        licence=content.metadata.get("licence"),
    )


def _kind(content: Source) -> str:
    return "weights alone" if content.layout == "bare" else content.layout


def _part_info(part: Part) -> PartInfo:
    floats = [x for x in part.state_dict.values() if x.is_floating_point()]
    names = sorted({_DTYPES.get(x.dtype, str(x.dtype).removeprefix("torch.")) for x in floats})
    count = sum(
        x.numel()
        for key, x in part.state_dict.items()
        if x.is_floating_point() and not key.endswith(("running_mean", "running_var"))
    )
    return PartInfo(part.name, count, " and ".join(names), params_to_json(part.params))


def _version(content: Source, parts: dict[str, Part]) -> str:
    """The release that the parts belong to, as far as their sizes tell."""
    if "version" in content.metadata:
        return str(content.metadata["version"])
    versions = {found for part in parts.values() if (found := _version_of(part.params)) is not None}
    return " and ".join(sorted(versions)) or "v1 and v2 alike"


def _version_of(params: Params) -> str | None:
    if isinstance(params, DecoderParams):
        return "v2"
    if isinstance(params, PriorParams):
        return {1280: "v2", 1024: "v1 (or v2's first file, of June 2023)"}.get(params.c_cond)
    if isinstance(params, ImageEncoderParams):
        return {EFFICIENTNET_V2_S: "v2", EFFICIENTNET_V2_L: "v1"}.get(params.stages)
    return None
