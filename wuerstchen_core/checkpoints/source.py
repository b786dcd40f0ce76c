"""The content of a source: its networks, identified by their keys, with their params and release."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..common.dataclass_config import from_table
from ..common.text import printable
from ..models.prior import PriorParams
from .components import COMPONENTS, PARTS, TEXT_ENCODER, TOWERS, Params, Part, kind_of, parts_of
from .damage import names_source
from .dequant import dequantize, is_scaled, with_header_configs
from .infer_params import TOWER_ADVICE
from .key_maps import COMFYUI_PREFIX, foreign
from .lazy import AnyTensor, LazyTensor, lazy_state, load_state
from .prefixes import Found, choose, find_networks, name_unknown, unwrapped
from .release import guess_release, only_release, release_of, trained_sides, with_units
from .verify import check_weights
from .weight_files import WeightFile

# Prefixes of the prior's text tower and of the decoder's: ComfyUI's names, and those of stages and parts.
_TOWER_MARKS = (re.compile(r"clip_g|prior|stage_c"), re.compile(r"clip_h|decoder|stage_b"))

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
        held = printable(", ".join(contents))
        super().__init__(f"{path} is not a Würstchen model: it holds {held}. Choose another file")
        self.contents = tuple(contents)


@dataclass(frozen=True)
class Network:
    """One network's weights under our key names, with what the source states about its params."""

    kind: str
    tensors: dict[str, LazyTensor]
    scaled: bool = False  # True if stored in 8 bits with scales
    params_json: dict[str, Any] | None = None  # from a bundle's metadata
    config: dict[str, Any] = field(default_factory=dict)  # a folder's config.json
    problem: str = ""  # the reason why the tensors cannot be read

    def params(self) -> Params:
        """Returns the params of the metadata, or else those inferred from the tensors and config.json."""
        if self.problem:
            raise ValueError(self.problem)
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
        try:
            inferred = asdict(replace(entry.infer_params(self.tensors, **heads), **stated))
        except (LookupError, ArithmeticError, TypeError) as error:
            raise ValueError("the shapes of the weights contradict one another: download the file again") from error
        return from_table(entry.params, inferred, f"{self.kind} of config.json")  # which may state anything


@dataclass(frozen=True)
class Source:
    """The networks of a file or folder by part name (one text tower may have both names).

    `refused` describes state dicts that are not Würstchen's. `version` is the user's choice for a prior whose release
    is unclear. With `headers_only`, no file is read whole for its checksum.
    """

    path: Path
    layout: str
    networks: dict[str, Network]
    metadata: dict[str, Any] = field(default_factory=dict)
    refused: tuple[str, ...] = ()
    version: str = "auto"
    headers_only: bool = False

    @names_source
    def part(self, name: str) -> Part[Tensor]:
        """Returns the part `name` with its weights. Raises ValueError if the source does not have it."""
        part = self.lazy_part(name)
        return Part(part.name, part.params, load_state(part.state_dict), part.path, part.trained)

    @names_source
    def lazy_part(self, name: str) -> Part[LazyTensor]:
        """Returns the part `name` without computing its tensors. Raises ValueError if it is absent or does not fit."""
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
        part = Part(name, params, network.tensors, self.path, trained)
        check_weights(part)
        return part

    def part_names(self) -> dict[str, str]:
        """Returns names for `lazy_part` in the order of `PARTS`, by the names of what they are: a text tower that
        serves both stages is "text_encoder"."""
        names = {name: name for name in PARTS if name in self.networks}
        prior, decoder = (self.networks.get(name) for name in TOWERS)
        if prior is not None and prior is decoder:
            names[TEXT_ENCODER] = names.pop(TOWERS[0])
            del names[TOWERS[1]]
        return names

    def lazy_parts(self) -> dict[str, Part[LazyTensor]]:
        """Returns all parts. Raises ValueError if one is damaged."""
        return {name: replace(self.lazy_part(own), name=name) for name, own in self.part_names().items()}

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


def is_stage_b(setting: str) -> bool:
    """True if a setting of sampling is one of Stage B."""
    return setting.startswith(("decoder_", "temperature", "token_mode"))


def merge_licences(sources: Iterable[Source]) -> dict[str, str]:
    """Returns {"licence": ...} with the licences of all sources, or {} if there is none."""
    licences = dict.fromkeys(str(source.metadata["licence"]) for source in sources if source.metadata.get("licence"))
    return {"licence": " / ".join(licences)} if licences else {}


def merge_metadata(sources: Iterable[Source]) -> dict[str, Any]:
    """Returns the metadata of sources that form one model: all parts and licences, else the prior's or first value.

    The others add the settings of Stage B that the prior's source lacks. Raises ValueError if they are of two releases.
    """
    sources = sorted((source for source in sources if source.metadata), key=lambda one: "prior" not in one.networks)
    releases = {str(source.metadata["version"]): source.path for source in sources if "version" in source.metadata}
    if len(releases) > 1:
        found = " and ".join(f"{path} is from {release}" for release, path in releases.items())
        raise ValueError(f"{found}: use files of one release")
    merged: dict[str, Any] = {}
    for source in sources:
        parts = {**source.metadata.get("parts", {}), **merged.get("parts", {})}
        if "sampling" in merged:
            others = source.metadata.get("sampling", {})
            own = merged["sampling"]
            merged["sampling"] = own | {key: x for key, x in others.items() if is_stage_b(key) and key not in own}
        merged = {**source.metadata, **merged, "parts": parts}
    return {**merged, **merge_licences(sources)}


def make_network(
    kind: str,
    state: Mapping[str, LazyTensor],
    to_ours: Callable[[dict[str, Any]], dict[str, Any]],
    params: dict[str, Any] | None,
    config: dict[str, Any] | None = None,
    scaled_only: bool = False,
) -> Network:
    """Returns a network from a file's tensors, which `to_ours` maps. See `dequantize` for `scaled_only`."""
    network = Network(kind, {}, is_scaled(state), params, config or {})
    try:
        return replace(network, tensors=to_ours(dequantize(state, scaled_only)))
    except ValueError as error:
        return replace(network, problem=str(error))
    except LookupError:  # a tensor has no rows to split
        return replace(network, problem="the shapes of the weights contradict one another: download the file again")


def identify(path: Path, content: WeightFile, config: dict[str, Any], metadata: dict[str, Any]) -> Source:
    """Returns the networks in a file's state dicts, identified by their keys. Raises ForeignFile if there is none."""
    found: list[Found] = []
    refused: list[str] = []
    for label, state in content.states.items():
        plain = unwrapped(lazy_state(with_header_configs(path, state, content.metadata)))
        other = foreign(plain)
        candidates = [] if other else find_networks(label, plain)
        named = [foreign(one.state) for one in candidates]
        found += [one for one, name in zip(candidates, named, strict=True) if not name]
        refused += [other or name_unknown(plain)] if not candidates else [name for name in named if name]
    chosen = choose(path, found)
    if not chosen:
        raise ForeignFile(path, list(dict.fromkeys(refused)))
    networks: dict[str, Network] = {}
    for name, one in _name_parts(chosen, metadata.get("parts", {})):
        params = metadata.get("parts", {}).get(name)
        network = make_network(one.kind, one.state, COMPONENTS[one.kind].to_ours, params, config, scaled_only=True)
        networks |= dict.fromkeys(parts_of(name), network)
    in_checkpoint = len(chosen) > 1 and any(one.prefix == COMFYUI_PREFIX for one in chosen)
    paths = dict.fromkeys(one.path for one in chosen if one.path)
    layout = CHECKPOINT if in_checkpoint else " + ".join(paths) or "bare"
    return Source(path, layout, networks, metadata, tuple(dict.fromkeys(refused)))


def _name_parts(chosen: Sequence[Found], params: Mapping[str, Any]) -> list[tuple[str, Found]]:
    """Returns the part that each network is: text towers by their prefix, the metadata or their width."""
    towers = [one for one in chosen if one.kind == TEXT_ENCODER]
    names = []
    for one in towers:
        by_path = next((TOWERS[i] for i, mark in enumerate(_TOWER_MARKS) if mark.search(one.path)), None)
        by_params = next((part for part in params if kind_of(part) == TEXT_ENCODER), None)
        names.append(by_path or by_params)
    if len(towers) == 2 and (None in names or names[0] == names[1]):
        widths = [next((x.shape[-1] for key, x in one.state.items() if "token_embedding" in key), 0) for one in towers]
        wide_first = TOWERS if widths[0] >= widths[1] else TOWERS[::-1]  # the prior's is the wider one
        known = next((name for name in names if name is not None and names.count(name) == 1), None)
        names = [name or next(x for x in TOWERS if x != known) for name in names] if known else list(wide_first)
    own = {id(one): name or TEXT_ENCODER for one, name in zip(towers, names, strict=True)}
    return [(own.get(id(one), one.kind), one) for one in chosen]


def to_ours(state: dict[str, AnyTensor]) -> tuple[str, dict[str, AnyTensor]]:
    """Returns the kind of the one network in a state dict, and its weights under our key names.

    Raises ValueError if there is none; its message is the name of what it is.
    """
    found = [] if foreign(state) else find_networks("", state)
    if not found or (other := foreign(found[0].state)):
        raise ValueError(other if found else name_unknown(state))
    return found[0].kind, COMPONENTS[found[0].kind].to_ours(found[0].state)
