"""What each loader offers, and what it finds in the file that is chosen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..wuerstchen_core.checkpoints import Part
from ..wuerstchen_core.checkpoints.components import (
    BUNDLE_LOADER,
    CLIP_LOADER,
    MODEL_LOADER,
    PARTS_OF,
    TEXT_ENCODER,
    TOKEN_LOADER,
    TOWERS,
    VAE_LOADER,
    Loader,
    parts_loaded_by,
)
from ..wuerstchen_core.checkpoints.infer_params import CLIP_NAMES
from ..wuerstchen_core.checkpoints.key_maps import LORA
from ..wuerstchen_core.checkpoints.open import open_source
from ..wuerstchen_core.checkpoints.source import ForeignFile, Source
from .host import folders


@dataclass(frozen=True)
class Shelf:
    """One loader: its node, the host's folder that it reads, and the parts that it takes from there."""

    node: str
    folder: str
    parts: tuple[str, ...]
    takes: str


def _shelf(loader: Loader, takes: str) -> Shelf:
    return Shelf(loader.node, loader.folder, parts_loaded_by(loader), takes)


MODEL = _shelf(MODEL_LOADER, "a prior (Stage C) or v2's decoder (Stage B)")
TOKENS = _shelf(TOKEN_LOADER, "v1's token decoder (Stage B)")
CLIP = _shelf(CLIP_LOADER, " or ".join(CLIP_NAMES.values()))
VAE = _shelf(VAE_LOADER, "Stage A or an image encoder")

_NAMES = {
    "prior": "a prior (Stage C)",
    "decoder": "a decoder (Stage B)",
    "token_decoder": "Stage B of Würstchen v1, which paints tokens",
    "vqgan": "Stage A",
    "image_encoder": "an image encoder",
    **dict.fromkeys(TOWERS, "a text tower"),
}
# How the parts of a bundle are offered by name.
_OF = " of "
_LABELS = {
    "prior": "prior",
    "token_decoder": "token decoder",
    "vqgan": "Stage A",
    "image_encoder": "image encoder",
    TEXT_ENCODER: "text tower",
    TOWERS[0]: "text tower (prior)",
    TOWERS[1]: "text tower (decoder)",
}


def fingerprint(find: Callable[[str], Path], name: str | None) -> Any:
    """What changes when a file does."""
    if name is None:  # another node gives the name, and the host knows when that changes
        return None
    status = find(name).stat()
    return name, status.st_mtime_ns, status.st_size


def choices(shelf: Shelf) -> list[str]:
    """What a loader offers: the files of its folder, then the parts that bundles of v1 have for it."""
    bundled = [
        f"{_LABELS[part]}{_OF}{bundle}"
        for bundle, held in folders.v1_bundles().items()
        for part in held
        if part in _LABELS and {part, f"prior_{part}"} & set(shelf.parts)
    ]
    return [*folders.file_names(shelf.folder), *bundled]


def find(shelf: Shelf, name: str) -> tuple[Path, str | None]:
    """The file behind one of `choices`, and the name of the part that is meant, where the file has several."""
    label, _, bundle = name.partition(_OF)
    part = next((part for part, words in _LABELS.items() if words == label), None)
    if part is None or not bundle or name in folders.file_names(shelf.folder):
        return folders.file_path(shelf.folder, name), None
    return folders.bundle_path(bundle), TOWERS[0] if part == TEXT_ENCODER else part


def path_of(shelf: Shelf, name: str) -> Path:
    return find(shelf, name)[0]


def _refusal(name: str, shelf: Shelf, found: tuple[str, ...], other: tuple[str, ...]) -> ValueError:
    """A sentence about a file without a part for the shelf: what it holds, and what takes that."""
    held = ", ".join(dict.fromkeys((*(_NAMES[part] for part in found), *other)))
    right = next((shelf for shelf in (MODEL, TOKENS, CLIP, VAE) if set(shelf.parts) & set(found)), None)
    if right is not None:
        advice = f"put it into the {right.folder} folder, for {right.node}"
    elif LORA in other:
        advice = "put it into the loras folder, for a LoRA loader"
    else:
        advice = "choose another file, and ComfyUI's own loaders for this one"
    return ValueError(f"{name!r} holds {held}, and {shelf.node} takes {shelf.takes}: {advice}")


def open_from(name: str, shelf: Shelf, version: str = "auto") -> tuple[Source, str]:
    """A file of a shelf, and the name of its one part that belongs there."""
    path, part = find(shelf, name)
    try:
        source = open_source(path, version=version)
    except ForeignFile as error:
        raise _refusal(name, shelf, (), error.contents) from error
    if part is not None:
        return source, part
    # One tower may serve both stages.
    found = {id(source.networks[part]): part for part in reversed(shelf.parts) if part in source.networks}
    if not found:
        raise _refusal(name, shelf, tuple(source.networks), source.refused)
    if len(found) > 1:
        if is_v1(source):
            advice = "put it into the checkpoints folder, where it is offered here part by part"
        elif set(PARTS_OF["v2"]) <= set(source.networks):
            advice = f"put it into the {BUNDLE_LOADER.folder} folder, for {BUNDLE_LOADER.node}"
        else:
            advice = "`convert` it into a folder of single files, or with what is missing into one bundle"
        raise ValueError(f"{name!r} holds several parts of a model, and {shelf.node} takes one: {advice}")
    return source, next(iter(found.values()))


def read_from(name: str, shelf: Shelf, version: str = "auto") -> Part:
    source, part = open_from(name, shelf, version)
    return source.part(part)


def is_v1(source: Source) -> bool:
    return source.metadata.get("version") == "v1"
