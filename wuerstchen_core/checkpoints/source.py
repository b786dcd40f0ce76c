"""The content of a source: its networks, identified by their keys, with their params and release."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from ..common.dataclass_config import from_table
from ..common.text import listed
from ..models.prior import PriorParams
from .components import COMPONENTS, PARTS, TEXT_ENCODER, TOWERS, Params, Part, State, kind_of, parts_of
from .infer_params import TOWER_ADVICE
from .key_maps import COMFYUI_CLIPS, COMFYUI_ENCODER, COMFYUI_PREFIX, foreign, strip_prefix
from .lazy import AnyTensor, LazyTensor, lazy_state
from .quant import dequantize, is_scaled
from .release import guess_release, only_release, release_of, trained_sides, with_units
from .weight_files import WeightFile

BUNDLE = "bundle"  # the layout of this project's own files
CHECKPOINT = "ComfyUI checkpoint"  # that of ComfyUI's CheckpointSave

# Fields of a config.json with params that no tensor shows, by diffusers' or transformers' name.
_CONFIG_FIELDS = {
    "nhead": "nhead",
    "num_attention_heads": "heads",
    "self_attn": "self_attn",
    "scale_factor": "scale_factor",
}


class ForeignFile(ValueError):
    """Raised for a file that has only weights of other models; `contents` describes them."""

    def __init__(self, path: Path, contents: Sequence[str]):
        super().__init__(f"{path} is not a Würstchen model: it holds {', '.join(contents)}. Choose another file")
        self.contents = tuple(contents)


@dataclass(frozen=True)
class Network:
    """One network's weights under our key names, with what the source states about its params."""

    kind: str
    tensors: dict[str, LazyTensor]
    scaled: bool = False  # True if stored in fp8 with scales
    params_json: dict[str, Any] | None = None  # from a bundle's metadata
    config: dict[str, Any] = field(default_factory=dict)  # a folder's config.json

    @cached_property
    def state(self) -> State:
        return {key: x.load() for key, x in self.tensors.items()}

    def params(self) -> Params:
        """Returns the params of the metadata, or else those inferred from the tensors and config.json."""
        entry = COMPONENTS[self.kind]
        if self.params_json is not None:
            try:
                return from_table(entry.params, self.params_json, self.kind)
            except ValueError as error:
                raise ValueError(f"the params in the file's metadata do not fit this version: {error}") from error
        config = self.config.get("text_config", self.config)  # of a whole CLIPModel
        if self.kind == TEXT_ENCODER and config.get("hidden_act", "gelu") != "gelu":
            raise ValueError(f"this text tower uses {config['hidden_act']} but Würstchen's use gelu: {TOWER_ADVICE}")
        fields = entry.params.__dataclass_fields__
        stated = {ours: config[key] for key, ours in _CONFIG_FIELDS.items() if ours in fields and key in config}
        stated = {name: tuple(value) if isinstance(value, list) else value for name, value in stated.items()}
        heads = {name: stated.pop(name) for name in ("nhead", "heads") if name in stated}
        return replace(entry.infer_params(self.tensors, **heads), **stated)


@dataclass(frozen=True)
class Source:
    """The networks of a file or folder by part name (one text tower may have both names).

    `refused` describes state dicts that are not Würstchen's. `version` is the user's choice for a prior whose release
    is unclear. `headers_only` is True if the source was opened without its weights.
    """

    path: Path
    layout: str
    networks: dict[str, Network]
    metadata: dict[str, Any] = field(default_factory=dict)
    refused: tuple[str, ...] = ()
    version: str = "auto"
    headers_only: bool = False

    def part(self, name: str) -> Part[Tensor]:
        """Returns the part `name` with its weights. Raises ValueError if the source does not have it."""
        part = self.lazy_part(name)
        return Part(part.name, part.params, self.networks[name].state, part.path, part.trained)

    def lazy_part(self, name: str) -> Part[LazyTensor]:
        """Returns the part `name` without computing its tensors. Raises ValueError if the source does not have it."""
        if name not in self.networks:
            raise no_part(self.path, name, (*self.networks, *self.refused))
        network = self.networks[name]
        try:
            params = network.params()
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from error
        if isinstance(params, PriorParams) and network.params_json is None:
            release = self.known_release(params) or guess_release(self.path, params, self.version, self.headers_only)
            params = with_units(params, release)
        trained = trained_sides(params, self.metadata) if isinstance(params, PriorParams) else None
        return Part(name, params, network.tensors, self.path, trained)

    def lazy_parts(self) -> dict[str, Part[LazyTensor]]:
        """Returns all parts in the order of `PARTS`; a text tower that serves both stages is "text_encoder"."""
        parts = {name: self.lazy_part(name) for name in PARTS if name in self.networks}
        prior, decoder = (self.networks.get(name) for name in TOWERS)
        if prior is not None and prior is decoder:
            parts[TEXT_ENCODER] = replace(parts.pop(TOWERS[0]), name=TEXT_ENCODER)
            del parts[TOWERS[1]]
        return parts

    def known_release(self, params: PriorParams) -> str | None:
        """Returns the release of a prior with these params; None if only its checksum can show it."""
        if "version" in self.metadata:
            return str(self.metadata["version"])
        return "v2" if params.c_cond == PriorParams.c_cond else only_release(self.releases())

    def releases(self) -> set[str]:
        """Returns the releases of the parts other than a prior, without those of parts that cannot be loaded."""
        found = set()
        for network in self.networks.values():
            with suppress(ValueError):  # loading that part reports it
                found.add(None if network.kind == "prior" else release_of(network.params()))
        return {release for release in found if release}


def no_part(path: Path, name: str, contents: Sequence[str]) -> ValueError:
    """Returns the error for a source without the part `name`."""
    return ValueError(f"{path} has no {name}; it holds {', '.join(contents) or 'nothing known'}")


def merge_licences(sources: Iterable[Source]) -> dict[str, str]:
    """Returns {"licence": ...} with the licences of all sources, or {} if there is none."""
    licences = dict.fromkeys(str(source.metadata["licence"]) for source in sources if source.metadata.get("licence"))
    return {"licence": " / ".join(licences)} if licences else {}


def merge_metadata(sources: Iterable[Source]) -> dict[str, Any]:
    """Returns the metadata of sources that form one model: all parts and licences, otherwise the first value.

    Raises ValueError if they are of two releases.
    """
    sources = [source for source in sources if source.metadata]
    releases = {str(source.metadata["version"]): source.path for source in sources if "version" in source.metadata}
    if len(releases) > 1:
        found = " and ".join(f"{path} is from {release}" for release, path in releases.items())
        raise ValueError(f"{found}: use files of one release")
    merged: dict[str, Any] = {}
    for source in sources:
        parts = {**source.metadata.get("parts", {}), **merged.get("parts", {})}
        merged = {**source.metadata, **merged, "parts": parts}
    return {**merged, **merge_licences(sources)}


def identify(path: Path, content: WeightFile, config: dict[str, Any], metadata: dict[str, Any]) -> Source:
    """Returns the networks in a file's state dicts, identified by their keys. Raises ForeignFile if there is none."""
    networks: dict[str, Network] = {}
    refused: list[str] = []
    params = metadata.get("parts", {})
    for label, state in content.states.items():
        try:
            kind, ours = to_ours(dequantize(lazy_state(state), scaled_only=True))
        except ValueError as error:
            refused.append(str(error))
        else:
            named = (part for part in (label, *params) if part in PARTS and kind_of(part) == kind)
            name = next(named, kind)  # which stage's tower it is
            network = Network(kind, ours, is_scaled(state), params.get(name), config)
            networks |= dict.fromkeys(parts_of(name), network)
    if not networks:
        raise ForeignFile(path, refused)
    layout = " + ".join(key for key in content.states if key) or "bare"
    return Source(path, layout, networks, metadata, tuple(refused))


def split_checkpoint(content: WeightFile) -> WeightFile | None:
    """Splits a file of ComfyUI's CheckpointSave into the states of its MODEL, CLIP and VAE; returns None for others.

    The CLIP's name tells its stage.
    """
    state = content.states.get("", {})
    network = strip_prefix(state, COMFYUI_PREFIX)
    stage = next((kind for kind in COMFYUI_CLIPS if any(mark in network for mark in COMPONENTS[kind].marks)), None)
    if stage is None:
        return None
    states = {stage: network}
    for kind, clip in COMFYUI_CLIPS.items():
        states[f"{kind}_{TEXT_ENCODER}"] = strip_prefix(state, f"cond_stage_model.{clip}.transformer.")
    states["vae"] = strip_prefix(state, "first_stage_model.")
    states = {label: state for label, state in states.items() if state}
    return replace(content, states=states) if len(states) > 1 else None


def to_ours(state: dict[str, AnyTensor]) -> tuple[str, dict[str, AnyTensor]]:
    """Returns the kind of network that weights are, and the weights under our key names.

    Raises ValueError if they are not Würstchen's; its message is the name of what they are.
    """
    if any(key.startswith(COMFYUI_PREFIX) for key in state):
        state = strip_prefix(state, COMFYUI_PREFIX)
    if any(f"{COMFYUI_ENCODER}{mark}" in state for mark in COMPONENTS["image_encoder"].marks):
        state = strip_prefix(state, COMFYUI_ENCODER)
    if other := foreign(state):
        raise ValueError(other)
    for kind, entry in COMPONENTS.items():
        if any(mark in state for mark in entry.marks):
            return kind, entry.to_ours(state)
    raise ValueError(f"unknown weights (first keys: {listed(list(state)) or 'none'})")
