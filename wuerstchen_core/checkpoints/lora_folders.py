"""Finds LoRA files in folders."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from ..common.text import listed
from .folder_files import hub_snapshot
from .lora_config import PEFT_CONFIG
from .lora_keys import parse_key
from .weight_files import read_weight_file

STEMS = ("adapter_model", "pytorch_lora_weights")  # of the files that PEFT and diffusers look for in a folder
ENDINGS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
_NETWORKS, _TOWER = {"prior", "unet"}, "text_encoder"  # subfolders of PEFT's adapters of one pipeline


def find_loras(folder: Path) -> list[Path]:
    """Returns the LoRA files of a folder that form one LoRA; [] if it has none.

    These are PEFT's or diffusers' file, PEFT's files in subfolders by component, or the only file with adapters.
    Raises ValueError if several files could be meant.
    """
    folder = hub_snapshot(folder)
    if (folder / "model_index.json").is_file():  # a whole pipeline
        return []
    if named := _named_file(folder):
        return [named]
    subfolders = [x for x in sorted(folder.iterdir()) if (x / PEFT_CONFIG).is_file()]
    found = {x.name: file for x in subfolders if (file := _named_file(x))}
    files = list(found.values()) or [file for file in _weight_files(folder) if _has_adapters(file)]
    if len(files) > 1 and not (_TOWER in found and len(found) == 2 and found.keys() & _NETWORKS):
        names = listed([str(file.relative_to(folder)) for file in files], most=5)
        raise ValueError(f"{folder} holds several LoRAs ({names}): give one of these files")
    return files


def _named_file(folder: Path) -> Path | None:
    files = (folder / f"{stem}{ending}" for stem in STEMS for ending in (".safetensors", ".bin"))
    return next((file for file in files if file.is_file()), None)


def _weight_files(folder: Path) -> list[Path]:
    return [file for file in sorted(folder.iterdir()) if file.suffix in ENDINGS and file.is_file()]


def _has_adapters(path: Path) -> bool:
    with suppress(ValueError):  # not a weight file, or damaged
        return is_lora(path)
    return False


def is_lora(path: Path) -> bool:
    """True for a weight file that has keys of adapters, and for a folder that has nothing else.

    Raises ValueError for a damaged file, and for a folder of several LoRAs.
    """
    path = hub_snapshot(path)
    if path.is_dir():
        return bool(_named_file(path) or all(map(_has_adapters, _weight_files(path)))) and bool(find_loras(path))
    if path.suffix == ".json":  # the index of a sharded file
        return False
    content = read_weight_file(path)
    return any(parse_key(key)[0] for state in content.states.values() for key in state)
