"""The files that each loader node offers, and the component that it loads from the chosen file."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..wuerstchen_core.checkpoints import Part
from ..wuerstchen_core.checkpoints.components import (
    BUNDLE_LOADER,
    COMPONENTS,
    PARTS_OF,
    TEXT_ENCODER,
    TOWERS,
    Loader,
    component,
    kind_of,
    parts_loaded_by,
)
from ..wuerstchen_core.checkpoints.key_maps import LORA
from ..wuerstchen_core.checkpoints.open import open_source
from ..wuerstchen_core.checkpoints.source import ForeignFile, Source
from .host import folders

_OF = " of "
# Choices of a v1 bundle's parts, such as "Stage A of NAME". Never change these: saved workflows contain them.
_LABELS = {
    "vqgan": "Stage A",
    "control_net": "ControlNet",
    TEXT_ENCODER: "text tower",
    **{tower: f"text tower ({tower.removesuffix(f'_{TEXT_ENCODER}')})" for tower in TOWERS},
}


def _label(part: str) -> str:
    return _LABELS.get(part, part.replace("_", " "))


def _describe(parts: Iterable[str]) -> str:
    """Returns the kinds of parts in words, such as "prior (Stage C), image encoder"."""
    stages = {kind: COMPONENTS[kind].stage for kind in map(kind_of, parts)}
    titles = {kind: "ControlNet" if kind == "control_net" else kind.replace("_", " ") for kind in stages}
    return ", ".join(f"{titles[x]} ({y})" if y.startswith("Stage") else titles[x] for x, y in stages.items())


def fingerprint(path: Path | str | None) -> Any:
    """Returns a value that changes with the file; None without one: another node gives its name, which ComfyUI sees."""
    if not path:
        return None
    status = Path(path).stat()
    return str(path), status.st_mtime_ns, status.st_size


def choices(loader: Loader) -> list[str]:
    """Lists the files of a loader's folder, then its parts of v1 bundles."""
    parts = [
        f"{_label(part)}{_OF}{bundle}"
        for bundle, names in folders.split_bundles().items()
        for part in names
        if kind_of(part) in COMPONENTS and component(part).loader == loader
    ]
    return [*folders.file_names(loader.folder), *parts]


def find(loader: Loader, name: str) -> tuple[Path, str | None]:
    """Returns the file of one of `choices`, and the part to load if it is a bundle's."""
    label, _, bundle = name.partition(_OF)
    part = next((part for part in (*parts_loaded_by(loader), TEXT_ENCODER) if _label(part) == label), None)
    if part is None or not bundle or name in folders.file_names(loader.folder):
        return folders.file_path(loader.folder, name), None
    return folders.bundle_path(bundle), TOWERS[0] if part == TEXT_ENCODER else part


def _wrong_file(name: str, loader: Loader, parts: list[str], foreign: tuple[str, ...]) -> ValueError:
    """Returns the error for a file without a component of the loader: what it holds, and what loads that."""
    if parts:
        right = component(parts[0]).loader
        advice = f"move it to the {right.folder} folder and use {right.node}"
    elif LORA in foreign:
        advice = "move it to the loras folder and use a LoRA loader"
    else:
        advice = "choose another file, or use ComfyUI's own loaders for this one"
    contents = ", ".join(filter(None, (_describe(parts), *foreign)))
    return ValueError(
        f"{name!r} holds {contents}, but {loader.node} loads {_describe(parts_loaded_by(loader))}: {advice}"
    )


def open_from(name: str, loader: Loader, version: str = "auto") -> tuple[Source, str]:
    """Opens one of `choices`; returns the source and its part for the loader. ValueError unless it has exactly one."""
    path, part = find(loader, name)
    try:
        source = open_source(path, version=version)
    except ForeignFile as error:
        raise _wrong_file(name, loader, [], error.contents) from error
    if part is not None:
        return source, part
    # Both stages may share one text encoder.
    found = {id(source.networks[part]): part for part in reversed(parts_loaded_by(loader)) if part in source.networks}
    if not found:
        raise _wrong_file(name, loader, list(source.networks), source.refused)
    if len(found) > 1:
        if is_v1(source):
            advice = f"move it to the {BUNDLE_LOADER.folder} folder, from which this node offers its parts"
        elif set(PARTS_OF["v2"]) <= set(source.networks):
            advice = f"move it to the {BUNDLE_LOADER.folder} folder and use {BUNDLE_LOADER.node}"
        else:
            advice = "use `convert` to split it into a folder of single files"
        raise ValueError(f"{name!r} holds several parts of a model, but {loader.node} loads one: {advice}")
    return source, next(iter(found.values()))


def read_from(name: str, loader: Loader, version: str = "auto") -> Part:
    source, part = open_from(name, loader, version)
    return source.lazy_part(part)


def is_v1(source: Source) -> bool:
    return source.metadata.get("version") == "v1"
