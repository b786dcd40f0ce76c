"""Opens a source of weights: a file, a bundle, a folder of diffusers or of single files, or the shipped model."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ..common.files import check_file
from ..common.text import check_choice
from .bundle import parse_metadata, restore_token_rows, split_bundle
from .components import PARTS, TOWERS, Part, check_part_name, kind_of, parts_of
from .damage import names_source
from .dequant import with_header_configs
from .folder_files import component_path, hub_snapshot, no_weights, weights_in
from .infer_params import CLIP_NAMES
from .key_maps import LORA, foreign
from .lazy import LazyTensor, lazy_state
from .modelspec import FIELD, stated_fields
from .release import VERSIONS
from .shipped import MODELS, given_path
from .source import (
    BUNDLE,
    ForeignFile,
    Network,
    Source,
    identify,
    make_network,
    merge_metadata,
    no_part,
)
from .weight_files import LazyState, WeightFile, read_file_metadata, read_json, read_weight_file

WEIGHT_ENDINGS = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")
_PIPELINE_CLASSES = "Wuerstchen"  # how diffusers' class names begin; all of them are v2's


def source_path(source: str | os.PathLike[str]) -> Path:
    """Returns the file or folder of a source: of the hub's cache, a snapshot. ValueError if it does not exist."""
    path = given_path(source)
    if not path.exists():
        names = " or ".join(f'"{name}"' for name in MODELS)
        raise ValueError(f"{path} does not exist: give a weight file, a diffusers folder, or {names}")
    check_file(path)
    return hub_snapshot(path)


@names_source
def open_source(
    source: str | os.PathLike[str], part: str | None = None, headers_only: bool = False, version: str = "auto"
) -> Source:
    """Opens "demo", "demo-v1", a file or a folder (with `part`, only this part of it).

    `version` ("v1" or "v2") is the release of a prior that cannot be determined otherwise (see `release`). With
    `headers_only`, no file is read whole for its checksum.
    """
    check_choice("version", version, VERSIONS)
    if part is not None:
        check_part_name(part)
    path = source_path(source)
    opened = _open_folder(path, part) if path.is_dir() else _open_file(path)
    return replace(opened, version=version, headers_only=headers_only)


def read_part(source: str | os.PathLike[str], name: str, version: str = "auto") -> Part:
    """Reads one part of a source, with `version` as in `open_source`.

    Sources: a .safetensors or PyTorch file (original, diffusers, transformers, open_clip, ComfyUI), a folder (a
    pipeline, one component, or bundles), a bundle, "demo" or "demo-v1".
    Raises ValueError if the source has no such part or can't be read.
    """
    return open_source(source, name, version=version).part(name)


def open_part(source: str | os.PathLike[str], name: str, version: str = "auto") -> Part[LazyTensor]:
    """Returns a part as `read_part`, whose tensors are read when they are loaded."""
    return open_source(source, name, version=version).lazy_part(name)


@names_source
def read_metadata(source: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns a bundle's JSON; {} for every other source."""
    path = source_path(source)
    return {} if path.is_dir() else parse_metadata(path, read_file_metadata(path))


def _open_file(path: Path, config: dict[str, Any] | None = None) -> Source:
    """Opens a weight file or the index of its shards; `config` is its folder's config.json."""
    content = _read_shards(path) if path.suffix == ".json" else read_weight_file(path)
    metadata = parse_metadata(path, content.metadata)
    if not metadata and (stated := stated_fields(content.metadata)):
        metadata = {FIELD: stated}
    bare = with_header_configs(path, content.states.get("", {}), content.metadata)
    bundled = split_bundle(bare) if foreign(bare) != LORA else None  # a LoRA's keys can start like a bundle's
    if bundled is None:
        return identify(path, content, config or {}, metadata)
    networks: dict[str, Network] = {}
    for name, state in sorted(bundled.items(), key=lambda item: item[0] in PARTS):  # a shared text tower first
        params = metadata.get("parts", {}).get(name)
        network = make_network(kind_of(name), lazy_state(state), partial(restore_token_rows, params=params), params)
        networks |= dict.fromkeys(parts_of(name), network)
    return Source(path, BUNDLE, networks, metadata)


def _open_folder(root: Path, part: str | None) -> Source:
    """Opens a folder of a pipeline, of one component, or of bundles; with `part`, only this part of it."""
    if weights_in(root) is not None:
        return _open_component(root)
    found = {name: path for name in PARTS if (path := component_path(root, name)) is not None}
    index = root / "model_index.json"
    pipeline = str(read_json(index).get("_class_name", "")) if index.is_file() else ""
    if pipeline and not pipeline.startswith(_PIPELINE_CLASSES):
        raise ForeignFile(root, (f"the parts of a {pipeline}",))
    if not index.is_file():
        found |= _bundled_parts(root, found) or ({} if found else _loose_parts(root))
    if not found:
        raise no_weights(root)
    if part is not None and part not in found:
        raise no_part(root, part, list(found))
    if part is not None:
        found = {part: found[part]}
    opened = {path: _open_component(path) for path in found.values()}
    for name, path in found.items():
        if name not in opened[path].networks:
            raise no_part(path, name, list(opened[path].networks))
    layout = "folder of single files" if all(path.is_file() for path in opened) else "diffusers folder"
    if [source.layout for source in opened.values()] == [BUNDLE]:
        layout = BUNDLE
    metadata = _card_licence(root) | merge_metadata(opened.values()) | ({"version": "v2"} if pipeline else {})
    return Source(root, layout, {name: opened[path].networks[name] for name, path in found.items()}, metadata)


def _open_component(path: Path) -> Source:
    """Opens a component's folder (weights in one file or several, and config.json), or a single file."""
    if path.is_file():
        return _open_file(path)
    file = weights_in(path)
    assert file is not None
    config = read_json(path / "config.json") if (path / "config.json").is_file() else {}
    source = _open_file(file, config)
    metadata = _card_licence(path) | dict(source.metadata)
    if str(config.get("_class_name", "")).startswith(_PIPELINE_CLASSES):
        metadata.setdefault("version", "v2")
    layout = BUNDLE if source.layout == BUNDLE else "diffusers component"
    return replace(source, path=path, layout=layout, metadata=metadata)


def _read_shards(index: Path) -> WeightFile:
    """Reads the weight files that an index lists as one."""
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict):
        raise ValueError(f"{index} lists no weight files: download the whole folder again")
    state: LazyState = {}
    if any(not isinstance(shard, str) or Path(shard).name != shard for shard in shards.values()):
        raise ValueError(f"{index} does not name files beside it: download the whole folder again")
    for shard in sorted(set(shards.values())):
        if not os.path.isfile(index.parent / shard):  # also if the name is too long
            raise ValueError(f"{index} lists {shard}, which is missing: download the whole folder again")
        content = read_weight_file(index.parent / shard)
        state |= lazy_state(with_header_configs(index.parent / shard, content.states.get("", {}), content.metadata))
    return WeightFile({"": state}, {})


def _bundled_parts(root: Path, found: Mapping[str, Path]) -> dict[str, Path]:
    """Returns files of parts in bundles of any name, in a folder or in a training run (`STAGE/STAGE.safetensors`).

    Skips a bundle with a part that was `found` elsewhere: it is another model's. Raises ValueError if two hold the
    same part.
    """
    runs = (folder / f"{folder.name}.safetensors" for folder in root.iterdir() if folder.is_dir())
    parts: dict[str, Path] = {}
    for file in sorted((*root.glob("*.safetensors"), *runs)):
        metadata = parse_metadata(file, read_file_metadata(file)) if file.is_file() else {}
        names = [name for part in metadata.get("parts", {}) for name in parts_of(part)]
        if any(found.get(name, file) != file for name in names):
            continue
        if duplicate := next((name for name in names if name in parts), None):
            raise ValueError(f"both {parts[duplicate]} and {file} hold a {duplicate}: use one of them")
        parts |= dict.fromkeys(names, file)
    return parts


def _loose_parts(root: Path) -> dict[str, Path]:
    """Returns the weight files of parts in a folder of files of any names, such as the published ones.

    Text towers are told apart by their width. Raises ValueError if two files hold the same part.
    """
    parts: dict[str, Path] = {}
    for file in sorted(path for path in root.iterdir() if path.suffix.lower() in WEIGHT_ENDINGS and path.is_file()):
        try:
            source = _open_file(file)
        except ForeignFile:  # another model's, or a LoRA
            continue
        names = list(source.networks)
        if set(TOWERS) <= set(names) and source.networks[TOWERS[0]] is source.networks[TOWERS[1]]:
            width = source.lazy_part(TOWERS[0]).params.width
            released = dict(zip(CLIP_NAMES, TOWERS, strict=True))
            names = [name for name in names if name not in TOWERS or name == released.get(width, name)]
        if duplicate := next((name for name in names if name in parts), None):
            raise ValueError(f"both {parts[duplicate]} and {file} hold a {duplicate}: use one of them")
        parts |= dict.fromkeys(names, file)
    lone = [name for name in TOWERS if name in parts]
    if len(lone) == 1 and "token_decoder" in parts:  # v1's stages share one
        parts |= dict.fromkeys(TOWERS, parts[lone[0]])
    return parts


def _card_licence(root: Path) -> dict[str, str]:
    """Returns {"licence": ...} from the head of the model card (README.md), or {} if it names none."""
    card = root / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    head = text.partition("\n---")[0] if text.startswith("---\n") else ""
    licence = re.search(r"^license: *(\S.*?) *$", head, re.MULTILINE)
    return {"licence": licence[1]} if licence else {}
