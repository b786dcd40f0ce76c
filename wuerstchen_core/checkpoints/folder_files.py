"""Finds weight files in folders: diffusers' variants and sharded files, parts of a pipeline, and the hub's cache."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from ..common.text import listed
from .components import PARTS, TEXT_ENCODER, TOWERS, kind_of
from .file_kinds import name_kind

logger = logging.getLogger(__name__)

STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
_ENDINGS = ("safetensors", "bin")
# A weight file, or the index of its shards: diffusers and transformers put the variant's name before or behind `index`.
_NAME = re.compile(
    rf"({'|'.join(STEMS)})(?:\.(\w+))??\.({'|'.join(_ENDINGS)})(\.index(?:\.(\w+))?\.json)?", re.IGNORECASE
)
_VARIANTS = ("", "ema", "fp32", "bf16", "fp16")  # in the order of preference; then others, then these
_LAST = ("non_ema",)
_OTHERS = (".onnx", ".gguf", ".xml", ".bin", ".safetensors", ".tflite", ".h5", ".engine", ".zip")
_HUB = "models--"  # how the folders of the hub's cache begin


def weights_in(folder: Path) -> Path | None:
    """Returns the weight file of a component's folder, or the index of its shards; None if there is none.

    As in diffusers, the full weights precede variants, such as fp16 or non_ema. Logs a line about a choice between
    variants. Raises ValueError for a link to a file that is missing.
    """
    if not folder.is_dir():
        return None
    found = [(match, path) for path in sorted(folder.iterdir()) if (match := _NAME.fullmatch(path.name))]
    if not found:
        return None
    variants = dict.fromkeys(sorted((_variant(match) for match, _ in found), key=_preference))
    match, file = min(found, key=lambda item: (_preference(_variant(item[0])), *_form(item[0])))
    if "" not in variants and len(variants) > 1:
        logger.warning(f"{folder} has the variants {', '.join(variants)}: {file.name} is used")
    if not file.exists():
        raise ValueError(f"{file} is a link to a file that is missing: download it again")
    return file


def _variant(match: re.Match[str]) -> str:
    return match[2] or match[5] or ""


def _preference(variant: str) -> tuple[int, str]:
    known = (*_VARIANTS, *_LAST)
    place = known.index(variant) if variant in known else len(known)
    return place + len(known) * (variant in _LAST) * 2, variant


def _form(match: re.Match[str]) -> tuple[int, int, int]:
    return _ENDINGS.index(match[3]), 1 if match[4] else 0, STEMS.index(match[1])


def component_path(root: Path, name: str) -> Path | None:
    """Returns a part's single file or its folder in a pipeline's folder; None if there is neither.

    The moving average that diffusers' trainer saves beside a network, such as `prior_ema`, is used in its absence.
    """
    for stem in (name, kind_of(name)):
        if (root / f"{stem}.safetensors").is_file():
            return root / f"{stem}.safetensors"
    combined = (root / TOWERS[0]).is_dir()  # in the combined pipeline "text_encoder" is the decoder's
    stage = root / name.removesuffix(f"_{TEXT_ENCODER}")
    folders = [name]
    if name not in TOWERS:
        folders.append(f"prior_{name}")  # in the combined pipeline
    elif name == TOWERS[1] if combined else stage.is_dir() or stage.with_name(f"{stage.name}_ema").is_dir():
        folders.append(TEXT_ENCODER)
    folders += [f"{folder}_ema" for folder in folders]
    found = [root / folder for folder in folders if weights_in(root / folder) is not None]
    if len(found) > 1 and found[-1].name.endswith("_ema"):
        logger.warning(f"{root} has {listed([path.name for path in found])}: {found[0].name} is used")
    return found[0] if found else None


def hub_snapshot(path: Path) -> Path:
    """Returns the newest snapshot in a folder `models--OWNER--NAME` of the hub's cache; other paths unchanged.

    Raises ValueError if it is not clear which snapshot is meant.
    """
    root = path.parent if path.name == "snapshots" else path
    snapshots = root / "snapshots"
    if not path.is_dir() or not (root.name.startswith(_HUB) or (root / "refs").is_dir()) or not snapshots.is_dir():
        return path
    found = sorted(folder for folder in snapshots.iterdir() if folder.is_dir())
    ref = root / "refs" / "main"
    if ref.is_file():
        named = snapshots / ref.read_text("utf-8", errors="replace").strip()
        if named in found:
            return named
        raise ValueError(f"{ref} names the snapshot {named.name}, which is missing: download the model again")
    if len(found) == 1:
        return found[0]
    if not found:
        raise ValueError(f"{snapshots} is empty: download the model again")
    names = listed([folder.name for folder in found])
    raise ValueError(f"{root} has no refs/main and {len(found)} snapshots ({names}): choose one of these folders")


def no_weights(root: Path) -> ValueError:
    """Returns the error for a folder without weights that can be read; it names what is there instead, if known."""
    hubs = [folder.name for folder in sorted(root.iterdir()) if folder.name.startswith(_HUB)]
    if hubs:
        return ValueError(f"{root} is a cache of several models ({listed(hubs)}): choose one of these folders")
    for file in sorted((*root.glob("*"), *root.glob("*/*"))):
        if file.suffix == ".msgpack":
            return ValueError(f"{file} is a Flax file: download the .safetensors or PyTorch file of this model instead")
        if file.suffix in _OTHERS and file.is_file() and (kind := name_kind(file)):
            return ValueError(f"{file} {kind}")
    return ValueError(
        f"{root} is not a diffusers folder and has no bundle: expected {STEMS[0]}.safetensors or .bin in it, "
        f"or in a subfolder named {', '.join((*PARTS, TEXT_ENCODER))}"
    )
