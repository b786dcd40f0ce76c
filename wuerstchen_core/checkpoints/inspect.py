"""What a source holds, told from headers alone."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from ..common.devices import WEIGHT_DTYPES
from ..models.prior import PriorParams
from .components import PARTS, PARTS_OF, TEXT_ENCODER, PlannedPart, kind_of, params_to_json, text_width, tower_name
from .open import open_source
from .release import version_of
from .source import BUNDLE, TOWERS, Source

_DTYPES = {dtype: name for name, dtype in WEIGHT_DTYPES.items()}
_WHY = {"image_encoder": "only pictures as input need it"}
OPEN = "v1 (or v2's first file, of June 2023)"
SHARED = "v1 and v2 alike"

# By the kind of a part: the stage it is, ComfyUI's folder for its file, and the node that loads it from there.
STAGES = {
    "prior": ("Stage C", "diffusion_models", "Würstchen Model Loader"),
    "decoder": ("Stage B", "diffusion_models", "Würstchen Model Loader"),
    "token_decoder": ("Stage B", "diffusion_models", "Würstchen Token Decoder Loader"),
    "vqgan": ("Stage A", "vae", "Würstchen VAE Loader"),
    "image_encoder": ("semantic compressor", "vae", "Würstchen VAE Loader"),
    TEXT_ENCODER: ("text", "text_encoders", "Würstchen CLIP Loader"),
}
WHOLE = ("checkpoints", "Würstchen Bundle Loader")  # takes a whole v2


@dataclass(frozen=True)
class PartInfo:
    """One part: how many parameters (buffers not counted), stored how, of which sizes, and what takes it in ComfyUI.

    `folder` and `node` are None where no node takes it out of this file.
    """

    name: str
    stage: str
    parameters: int
    dtype: str
    sizes: dict[str, Any]
    folder: str | None
    node: str | None


@dataclass(frozen=True)
class Description:
    """A source in words: `version` is "v1", "v2" or what both share; `missing` are the parts to paint that it lacks."""

    source: str
    kind: str
    version: str
    parts: tuple[PartInfo, ...]
    text_towers: dict[str, str]  # what the stages that read text must be given
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
            out.append(f"  {part.name} ({part.stage}): {part.parameters:,} parameters, {part.dtype} ({sizes})")
        out += [f"  the {name} reads the text through {tower}" for name, tower in self.text_towers.items()]
        out += [f"  it also holds {other}" for other in self.refused]
        if self.vocabulary is not None:
            out.append(f"  it knows {self.vocabulary} words")
        if self.licence:
            out.append(f"  licence: {self.licence}")
        for (folder, node), names in self._places().items():
            if folder is not None:
                out.append(f"  in ComfyUI: models/{folder}, {node} ({', '.join(names)})")
                continue
            out.append(
                f"  in ComfyUI no loader takes {', '.join(names)} out of this file: `convert` it into a folder of"
            )
            out.append(f"    single files, or {'with what is missing ' if self.missing else ''}into one bundle")
        missing = [f"{name} ({_WHY[name]})" if name in _WHY else name for name in self.missing]
        out.append(f"  missing for a complete model: {', '.join(missing)}" if missing else "  complete")
        return out

    def _places(self) -> dict[tuple[str | None, str | None], list[str]]:
        """The parts by the folder and the node that take them."""
        places: dict[tuple[str | None, str | None], list[str]] = {}
        for part in self.parts:
            places.setdefault((part.folder, part.node), []).append(part.name)
        return places


def describe(source: str | os.PathLike[str]) -> Description:
    """Tell what a source holds, without reading its weights; ValueError (as `read_part`) if it is nothing of Würstchen.

    A prior that may be v1's or v2's is described as v1's, its most likely owner.
    """
    content = open_source(source, headers_only=True)
    version, parts = _version(content), _parts(content)
    of_release = PARTS_OF["v1" if version in ("v1", OPEN) else "v2"]
    words = content.metadata.get("vocabulary", {}).get("words")
    widths = {name: width for name, part in parts.items() if (width := text_width(part.params)) is not None}
    places = _places(content, parts)
    return Description(
        source=str(source),
        kind="weights alone" if content.layout == "bare" else content.layout,
        version=version,
        parts=tuple(_part_info(part, content, *places[name]) for name, part in parts.items()),
        text_towers={name: tower_name(width) for name, width in widths.items()},
        missing=tuple(name for name in of_release if name not in content.networks),
        refused=content.refused,
        vocabulary=None if words is None else len(words),
        licence=content.metadata.get("licence"),
    )


def _parts(content: Source) -> dict[str, PlannedPart]:
    """The parts by name, one tower that serves both stages once."""
    parts = {name: content.planned(name) for name in PARTS if name in content.networks}
    prior, decoder = (content.networks.get(name) for name in TOWERS)
    if prior is not None and prior is decoder:
        tower = replace(parts[TOWERS[0]], name=TEXT_ENCODER)
        parts = {name: part for name, part in parts.items() if not name.endswith(TEXT_ENCODER)}
        parts[TEXT_ENCODER] = tower
    return parts


def _places(content: Source, parts: Mapping[str, PlannedPart]) -> dict[str, tuple[str | None, str | None]]:
    """The folder and the node that take each part in ComfyUI; no loader takes a file with two of its parts, but the one
    of whole bundles, and those of v1's offer them by name.
    """
    own: dict[str, tuple[str, str]] = {name: STAGES[kind_of(name)][1:] for name in parts}
    if content.layout == BUNDLE:
        if content.metadata.get("version") == "v1":
            return {name: (WHOLE[0] if len(parts) > 1 else folder, node) for name, (folder, node) in own.items()}
        if set(PARTS_OF["v2"]) <= content.networks.keys():
            return dict.fromkeys(parts, WHOLE)
    elif content.path.is_dir():  # each part is in a file of its own
        return dict(own)
    places = list(own.values())
    return {name: place if places.count(place) == 1 else (None, None) for name, place in own.items()}


def _part_info(part: PlannedPart, content: Source, folder: str | None, node: str | None) -> PartInfo:
    floats = {key: x for key, x in part.tensors.items() if x.dtype.is_floating_point}
    network = content.networks.get(part.name) or content.networks[f"prior_{TEXT_ENCODER}"]
    return PartInfo(
        name=part.name,
        stage=STAGES[kind_of(part.name)][0],
        parameters=sum(
            math.prod(x.shape) for key, x in floats.items() if not key.endswith(("running_mean", "running_var"))
        ),
        dtype=_dtypes((x.dtype for x in floats.values()), network.scaled),
        sizes=params_to_json(part.params),
        folder=folder,
        node=node,
    )


def _dtypes(dtypes: Iterable[torch.dtype], scaled: bool) -> str:
    names = {_DTYPES.get(dtype, str(dtype).removeprefix("torch.")) for dtype in dtypes}
    return " and ".join(sorted(f"{name} (scaled)" if name == "fp8" and scaled else name for name in names))


def _version(content: Source) -> str:
    """The release that the parts belong to, as far as they tell."""
    if "version" in content.metadata:
        return str(content.metadata["version"])
    versions = {version_of(content.planned(name).params) for name in content.networks if name != "prior"} - {None}
    if "prior" in content.networks and not versions:
        params = content.planned("prior").params
        assert isinstance(params, PriorParams)
        versions.add(content.told_version(params) or (OPEN if params.c_cond == 1024 else None))
    return " and ".join(sorted(version for version in versions if version)) or SHARED
