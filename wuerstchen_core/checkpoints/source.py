"""What a source holds: networks told by their keys, sizes, and whose release they are."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ..models.prior import PriorParams
from .components import TEXT_ENCODER, Params, Part, PlannedPart, State, params_from_json
from .infer_params import READERS, WHOLE_TOWERS
from .key_maps import to_ours
from .lazy import Planned, all_as_they_are
from .quant import dequantised, is_scaled
from .release import assumed_version, of_others, sure_version, version_of, with_units
from .weight_files import WeightFile

BUNDLE = "bundle"  # the layout of our own file format
TOWERS = tuple(f"{stage}_{TEXT_ENCODER}" for stage in ("prior", "decoder"))

# diffusers' and transformers' names for what no tensor shows.
_CONFIG_NAMES = {
    "prior": {"nhead": "nhead"},
    "decoder": {"nhead": "nhead", "self_attn": "self_attn"},
    "token_decoder": {"nhead": "nhead", "self_attn": "self_attn"},
    "vqgan": {"scale_factor": "scale_factor"},
    TEXT_ENCODER: {"num_attention_heads": "heads"},
}


class ForeignFile(ValueError):
    """A file that holds weights, but none of Würstchen's; `held` says what they are."""

    def __init__(self, path: Path, held: tuple[str, ...]):
        super().__init__(f"{path} is no model of Würstchen: it holds {', '.join(held)}, so choose another")
        self.held = held


@dataclass(frozen=True)
class Network:
    """One network's weights under our names, with what the source says of its sizes."""

    kind: str
    tensors: dict[str, Planned]
    scaled: bool = False  # stored in fp8 with scales
    sizes: dict[str, Any] | None = None  # a bundle's metadata
    config: dict[str, Any] = field(default_factory=dict)  # a folder's config.json

    @cached_property
    def state(self) -> State:
        """All tensors at once."""
        return {key: x.make() for key, x in self.tensors.items()}

    def params(self) -> Params:
        """The metadata's sizes, else those of the tensors."""
        if self.sizes is not None:
            return params_from_json(self.kind, self.sizes)
        config = self.config.get("text_config", self.config)  # of a whole CLIPModel
        if self.kind == TEXT_ENCODER and config.get("hidden_act", "gelu") != "gelu":
            raise ValueError(
                f"this text tower computes with {config['hidden_act']}, Würstchen's with gelu: {WHOLE_TOWERS}"
            )
        names = _CONFIG_NAMES.get(self.kind, {})
        stated = {ours: config[theirs] for theirs, ours in names.items() if theirs in config}
        stated = {name: tuple(value) if isinstance(value, list) else value for name, value in stated.items()}
        heads = {name: stated.pop(name) for name in ("nhead", "heads") if name in stated}
        return replace(READERS[self.kind](self.tensors, **heads), **stated)


@dataclass(frozen=True)
class Source:
    """What a source holds: networks by part name (one tower may stand under both), and what of it is not ours."""

    path: Path
    layout: str
    networks: dict[str, Network]
    metadata: dict[str, Any] = field(default_factory=dict)
    refused: tuple[str, ...] = ()
    version: str = "auto"  # the release of a prior that may be either's, as the user says it
    told: str | None = None  # the release that a folder's files tell
    by_headers: bool = False  # opened without its weights

    def part(self, name: str) -> Part:
        """The part `name`; ValueError if it is not there."""
        part = self.planned(name)
        return Part(name, part.params, self.networks[name].state)

    def planned(self, name: str) -> PlannedPart:
        """The part `name`, none of whose tensors is made yet; ValueError if it is not there."""
        if name not in self.networks:
            raise absent(self.path, name, [*self.networks, *self.refused])
        network, params = self.networks[name], self._params(name)
        if isinstance(params, PriorParams) and network.sizes is None:
            release = self.told_version(params) or assumed_version(self.path, params, self.version, self.by_headers)
            params = with_units(params, release)
        return PlannedPart(name, params, network.tensors)

    def told_version(self, params: PriorParams) -> str | None:
        """The release of a prior of these sizes, as far as the source tells it without its weights."""
        if "version" in self.metadata:
            return str(self.metadata["version"])
        return sure_version(params) or of_others(map(self.release_of, self.networks)) or self.told

    def files(self) -> list[Path]:
        """The weight files, and in a folder others like them."""
        if self.path.is_file():
            return [self.path]
        return [file for ending in ("safetensors", "bin") for file in self.path.rglob(f"*.{ending}")]

    def release_of(self, name: str) -> str | None:
        """The release that a part other than a prior names."""
        try:
            return version_of(self.networks[name].params())
        except ValueError:  # that part can't be loaded, which only matters to who asks for it
            return None

    def _params(self, name: str) -> Params:
        try:
            return self.networks[name].params()
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from error


def licences_of(sources: Iterable[Source]) -> dict[str, str]:
    """All licences that sources name, as one "licence" of metadata; {} if none does."""
    named = (source.metadata.get("licence") for source in sources)
    found = dict.fromkeys(str(licence) for licence in named if licence)
    return {"licence": " / ".join(found)} if found else {}


def merged(sources: Iterable[Source]) -> dict[str, Any]:
    """What several sources say of the one model that they make: all parts, all licences, and of the rest the first
    word. ValueError where they name two releases.
    """
    said = [source for source in sources if source.metadata]
    of = {str(source.metadata["version"]): source.path for source in said if "version" in source.metadata}
    if len(of) > 1:
        (one, file), (other, beside) = list(of.items())[:2]
        raise ValueError(f"{file} is of {one} and {beside} of {other}: give those of one release")
    found: dict[str, Any] = {}
    for source in said:
        found = {**source.metadata, **found, "parts": {**source.metadata.get("parts", {}), **found.get("parts", {})}}
    return {**found, **licences_of(said)}


def absent(path: Path, name: str, held: list[str]) -> ValueError:
    """That a source has no part `name`, and what it holds."""
    return ValueError(f"{path} has no {name}; it holds {', '.join(held) or 'nothing known'}")


def recognise(path: Path, content: WeightFile, config: dict[str, Any], metadata: dict[str, Any]) -> Source:
    """Tell by their keys what the state dicts of a file are."""
    networks: dict[str, Network] = {}
    refused: list[str] = []
    sizes = metadata.get("parts", {})
    for state in content.states.values():
        try:
            kind, ours = to_ours(dequantised(all_as_they_are(state)))
        except ValueError as error:
            refused.append(str(error))
        else:
            # A single part's file says in its metadata which tower it is.
            name = next(
                (part for part in sizes if part == kind or (kind == TEXT_ENCODER and part.endswith(kind))), kind
            )
            networks |= named(name, Network(kind, ours, is_scaled(state), sizes.get(name), config))
    if not networks:
        raise ForeignFile(path, tuple(refused))
    layout = " + ".join(key for key in content.states if key) or "bare"
    return Source(path, layout, networks, metadata, tuple(refused))


def named(name: str, network: Network) -> dict[str, Network]:
    """A network under its part's name; a tower that names no stage under both."""
    return {part: network for part in (TOWERS if name == TEXT_ENCODER else (name,))}
