"""Folders of weights, as diffusers, the trainers built on it, `convert` and our own trainers write them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from .bundle import parse_metadata
from .components import PARTS, TEXT_ENCODER, State
from .single import open_file
from .source import BUNDLE, TOWERS, ForeignFile, Source, absent, merged, recognise
from .weight_files import WeightFile, read_file_metadata, read_json, read_weight_file

# Where diffusers keeps each part (pipelines of one stage, and the combined one); towers: see `_component`.
_FOLDERS = {
    "prior": ("prior", "prior_prior"),
    "decoder": ("decoder",),
    "token_decoder": ("token_decoder",),
    "vqgan": ("vqgan",),
    "image_encoder": ("image_encoder",),
}
_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
_ENDINGS = tuple(
    f"{variant}{ending}{index}"
    for ending in (".safetensors", ".bin")
    for variant in ("", ".fp16")
    for index in ("", ".index.json")
) + (".safetensors.index.fp16.json", ".bin.index.fp16.json")
_PIPELINES = "Wuerstchen"  # how the names of its classes in diffusers begin; all of them are v2's


def _weights_of(folder: Path) -> Path | None:
    """The weight file (or the index of a divided one) of a component's folder."""
    files = (folder / f"{stem}{ending}" for ending in _ENDINGS for stem in _STEMS)
    return next((file for file in files if file.is_file()), None)


def _component(root: Path, name: str) -> Path | None:
    """A part's folder in a pipeline's folder, or its file in one that `convert` wrote."""
    files = (root / f"{stem}.safetensors" for stem in (name, TEXT_ENCODER) if stem == name or name in TOWERS)
    if own := next((file for file in files if file.is_file()), None):
        return own
    if name not in TOWERS:
        candidates = _FOLDERS[name]
    elif (root / TOWERS[0]).is_dir():  # the combined pipeline: the decoder's tower has the plain name
        candidates = (name,) if name == TOWERS[0] else (name, TEXT_ENCODER)
    else:  # a pipeline of one stage: its tower is that stage's
        stage = name.removesuffix(f"_{TEXT_ENCODER}")
        candidates = (TEXT_ENCODER,) if (root / stage).is_dir() else ()
    return next((root / folder for folder in candidates if _weights_of(root / folder)), None)


def _bundled(root: Path, found: Mapping[str, Path]) -> dict[str, Path]:
    """The parts in bundles of any name, in a folder or (`STAGE/STAGE.safetensors`) in that of a trainer's run.

    Those beside a part that was `found` elsewhere are another model's. ValueError where two hold the same part.
    """
    runs = (folder / f"{folder.name}.safetensors" for folder in root.iterdir() if folder.is_dir())
    parts: dict[str, Path] = {}
    for file in sorted((*root.glob("*.safetensors"), *runs)):
        told = parse_metadata(file, read_file_metadata(file)).get("parts", {}) if file.is_file() else {}
        held = [name for part in told for name in (TOWERS if part == TEXT_ENCODER else (part,))]
        if any(found.get(name, file) != file for name in held):
            continue
        if twice := next((name for name in held if name in parts), None):
            raise ValueError(f"both {parts[twice]} and {file} hold a {twice}: give one of them")
        parts |= dict.fromkeys(held, file)
    return parts


def open_folder(root: Path, wanted: str | None, headers_only: bool) -> Source:
    """Open a pipeline's or a component's folder; of a pipeline only the part `wanted`, if one is named."""
    if _weights_of(root) is not None:
        source = _open_component(root, headers_only)
        return replace(source, metadata=_card_licence(root) | dict(source.metadata))
    found = {name: folder for name in PARTS if (folder := _component(root, name)) is not None}
    index = root / "model_index.json"
    if not index.is_file():
        found |= _bundled(root, found)
    of_class = read_json(index).get("_class_name", "") if index.is_file() else ""
    if of_class and not str(of_class).startswith(_PIPELINES):
        raise ForeignFile(root, (f"the parts of a {of_class}",))
    if not found:
        folders = ", ".join((*(name for names in _FOLDERS.values() for name in names), TEXT_ENCODER))
        raise ValueError(
            f"{root} is no diffusers folder and holds no bundle: expected {_STEMS[0]}.safetensors or .bin in it, "
            f"or in a folder of it named {folders}"
        )
    if wanted is not None and wanted not in found:
        raise absent(root, wanted, list(found))
    names = {name: folder for name, folder in found.items() if wanted in (None, name)}
    opened = {folder: _open_component(folder, headers_only) for folder in names.values()}
    for name, folder in names.items():
        if name not in opened[folder].networks:
            raise absent(folder, name, list(opened[folder].networks))
    networks = {name: opened[folder].networks[name] for name, folder in names.items()}
    told = "v2" if of_class else next((source.told for source in opened.values() if source.told), None)
    files = all(folder.is_file() for folder in opened)
    layout = "folder of single files" if files else "diffusers folder"
    if [source.layout for source in opened.values()] == [BUNDLE]:
        layout = BUNDLE
    metadata = _card_licence(root) | merged(opened.values())
    return Source(root, layout, networks, metadata, told=told)


def _card_licence(root: Path) -> dict[str, str]:
    """The licence that a model card, as model hubs have them, names at its top; {} without one."""
    card = root / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    head = text.partition("\n---")[0] if text.startswith("---\n") else ""
    found = re.search(r"^license: *(\S.*?) *$", head, re.MULTILINE)
    return {"licence": found[1]} if found else {}


def _open_component(folder: Path, headers_only: bool) -> Source:
    """Open a component's folder: its weights, in one file or divided, and its config.json; or a part's single file."""
    if folder.is_file():
        return open_file(folder, headers_only)
    file = _weights_of(folder)
    if file is None:
        raise ValueError(f"{folder} holds no weights: expected {_STEMS[0]}.safetensors or .bin in it")
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    if file.suffix != ".json":
        source = open_file(file, headers_only, config)
    else:
        state: State = {}
        shards = read_json(file).get("weight_map")
        if not isinstance(shards, dict):
            raise ValueError(f"{file} names no weight files: fetch the whole folder again")
        for shard in sorted(set(shards.values())):
            if not (folder / shard).is_file():
                raise ValueError(f"{file} names {shard}, which is not beside it: fetch the whole folder")
            state |= read_weight_file(folder / shard, headers_only).states.get("", {})
        source = recognise(file, WeightFile({"": state}, {}), config, {})
    told = "v2" if str(config.get("_class_name", "")).startswith(_PIPELINES) else None
    layout = BUNDLE if source.layout == BUNDLE else "diffusers component"
    return replace(source, path=folder, layout=layout, told=told)
