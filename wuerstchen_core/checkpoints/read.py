"""From a source (file, folder, bundle, or the shipped model) to its parts."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .bundle import parse_metadata, split_bundle
from .files import WeightFile, read_file_metadata, read_json, read_weight_file
from .formats import LORA, foreign, to_ours
from .parts import PARTS, TEXT_ENCODER, Params, Part, State, kind_of, params_from_json
from .precision import widened
from .sizes import READERS, WHOLE_TOWERS

DEMO = "demo"
TOWERS = tuple(f"{stage}_{TEXT_ENCODER}" for stage in ("prior", "decoder"))

# Where diffusers keeps each part (pipelines of one stage, and the combined one); towers: see `_component`.
_FOLDERS = {
    "prior": ("prior", "prior_prior"),
    "decoder": ("decoder",),
    "token_decoder": ("token_decoder",),
    "vqgan": ("vqgan",),
    "image_encoder": ("image_encoder",),
}
_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
_ENDINGS = (".safetensors", ".safetensors.index.json", ".fp16.safetensors", ".bin", ".bin.index.json", ".fp16.bin")

# diffusers' and transformers' names for what no tensor shows.
_CONFIG_NAMES = {
    "prior": {"nhead": "nhead"},
    "decoder": {"nhead": "nhead", "self_attn": "self_attn"},
    "token_decoder": {"nhead": "nhead", "self_attn": "self_attn"},
    "vqgan": {"scale_factor": "scale_factor"},
    TEXT_ENCODER: {"num_attention_heads": "heads"},
}


class ForeignFile(ValueError):
    """A file that holds weights, but none of v2's; `held` says what they are."""

    def __init__(self, path: Path, held: tuple[str, ...]):
        super().__init__(f"{path} is no file for this loader: it holds {', '.join(held)}")
        self.held = held


@dataclass(frozen=True)
class Network:
    """One network's weights under our names, with what the source says of its sizes."""

    kind: str
    state: State
    sizes: dict[str, Any] | None = None  # a bundle's metadata
    config: dict[str, Any] = field(default_factory=dict)  # a folder's config.json

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
        return replace(READERS[self.kind](self.state, **heads), **stated)


@dataclass(frozen=True)
class Source:
    """What a source holds: networks by part name (one tower may stand under both), and what of it is not ours."""

    path: Path
    layout: str
    networks: dict[str, Network]
    metadata: dict[str, Any] = field(default_factory=dict)
    refused: tuple[str, ...] = ()

    def part(self, name: str) -> Part:
        """The part `name`; ValueError if it is not there."""
        if name not in self.networks:
            raise _absent(self.path, name, [*self.networks, *self.refused])
        network = self.networks[name]
        try:
            return Part(name, network.params(), network.state)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from error


def _absent(path: Path, name: str, held: list[str]) -> ValueError:
    return ValueError(f"{path} has no {name} for v2; it holds {', '.join(held) or 'nothing known'}")


def demo_path() -> Path:
    """The bundle that ships with this package."""
    return Path(__file__).parent.parent / "demo" / "wuerstchen-demo.safetensors"


def _path(source: str | os.PathLike[str]) -> Path:
    path = demo_path() if source == DEMO else Path(source)
    if not path.exists():
        raise ValueError(f"{path} does not exist: give a weight file, a diffusers folder, or {DEMO!r}")
    return path


def open_source(source: str | os.PathLike[str], wanted: str | None = None, headers_only: bool = False) -> Source:
    """Open "demo", a file or a folder; of a folder only the part `wanted`, if one is named."""
    path = _path(source)
    return _open_folder(path, wanted, headers_only) if path.is_dir() else _open_file(path, headers_only)


def read_part(source: str | os.PathLike[str], name: str) -> Part:
    """One part of a source: a .safetensors or PyTorch file (the original's, diffusers', transformers', open_clip's,
    ComfyUI's), a diffusers folder (a pipeline's or one component's), a bundle, or "demo".

    ValueError if the source has no such part or can't be read.
    """
    if name not in PARTS:
        raise ValueError(f"{name!r} is no part of a model: the parts are {', '.join(PARTS)}")
    return open_source(source, name).part(name)


def read_metadata(source: str | os.PathLike[str]) -> dict[str, Any]:
    """A bundle's JSON; {} for every other source."""
    path = _path(source)
    return {} if path.is_dir() else parse_metadata(path, read_file_metadata(path))


def _open_file(path: Path, headers_only: bool) -> Source:
    content = read_weight_file(path, headers_only)
    metadata = parse_metadata(path, content.metadata)
    bare = content.states.get("", {})
    bundled = split_bundle(bare) if foreign(bare) != LORA else None  # the keys of LoRA files may begin as a bundle's
    if bundled is None:
        return _recognise(path, content, {}, metadata)
    networks: dict[str, Network] = {}
    for name, stored in bundled.items():
        state = widened(stored)
        networks |= _named(name, Network(kind_of(name), state, metadata.get("parts", {}).get(name)))
    return Source(path, "bundle", networks, metadata)


def _recognise(path: Path, content: WeightFile, config: dict[str, Any], metadata: dict[str, Any]) -> Source:
    """Tell by their keys what the state dicts of a file are."""
    networks: dict[str, Network] = {}
    refused: list[str] = []
    for state in content.states.values():
        try:
            kind, ours = to_ours(state)
        except ValueError as error:
            refused.append(str(error))
        else:
            networks |= _named(kind, Network(kind, ours, config=config))
    if not networks:
        raise ForeignFile(path, tuple(refused))
    layout = " + ".join(key for key in content.states if key) or "bare"
    return Source(path, layout, networks, metadata, tuple(refused))


def _named(name: str, network: Network) -> dict[str, Network]:
    """A network under its part's name; a tower that names no stage under both."""
    return {part: network for part in (TOWERS if name == TEXT_ENCODER else (name,))}


def _weights_of(folder: Path) -> Path | None:
    """The weight file (or the index of a divided one) of a component's folder."""
    files = (folder / f"{stem}{ending}" for ending in _ENDINGS for stem in _STEMS)
    return next((file for file in files if file.is_file()), None)


def _component(root: Path, name: str) -> Path | None:
    """A part's folder in a pipeline's folder."""
    if name not in TOWERS:
        candidates = _FOLDERS[name]
    elif (root / TOWERS[0]).is_dir():  # the combined pipeline: the decoder's tower has the plain name
        candidates = (name,) if name == TOWERS[0] else (name, TEXT_ENCODER)
    else:  # a pipeline of one stage: its tower is that stage's
        stage = name.removesuffix(f"_{TEXT_ENCODER}")
        candidates = (TEXT_ENCODER,) if (root / stage).is_dir() else ()
    return next((root / folder for folder in candidates if _weights_of(root / folder)), None)


def _open_folder(root: Path, wanted: str | None, headers_only: bool) -> Source:
    if _weights_of(root) is not None:
        return _open_component(root, headers_only)
    found = {name: folder for name in PARTS if (folder := _component(root, name)) is not None}
    if not found:
        folders = ", ".join((*(name for names in _FOLDERS.values() for name in names), TEXT_ENCODER))
        raise ValueError(
            f"{root} is no diffusers folder: expected {_STEMS[0]}.safetensors or .bin in it, "
            f"or in a folder of it named {folders}"
        )
    if wanted is not None and wanted not in found:
        raise _absent(root, wanted, list(found))
    names = {name: folder for name, folder in found.items() if wanted in (None, name)}
    opened = {folder: _open_component(folder, headers_only) for folder in set(names.values())}
    for name, folder in names.items():
        if name not in opened[folder].networks:
            raise _absent(folder, name, list(opened[folder].networks))
    return Source(root, "diffusers folder", {name: opened[folder].networks[name] for name, folder in names.items()})


def _open_component(folder: Path, headers_only: bool) -> Source:
    """Open a component's folder: its weights, in one file or divided, and its config.json."""
    file = _weights_of(folder)
    if file is None:
        raise ValueError(f"{folder} holds no weights: expected {_STEMS[0]}.safetensors or .bin in it")
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    if file.suffix != ".json":
        content = read_weight_file(file, headers_only)
    else:
        state: State = {}
        for shard in sorted(set(read_json(file).get("weight_map", {}).values())):
            if not (folder / shard).is_file():
                raise ValueError(f"{file} names {shard}, which is not beside it: fetch the whole folder")
            state |= read_weight_file(folder / shard, headers_only).states.get("", {})
        content = WeightFile({"": state}, {})
    source = _recognise(file, content, config, {})
    return replace(source, path=folder, layout="diffusers component")
