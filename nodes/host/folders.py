"""Finds the user's files in ComfyUI's model folders, which are read and never changed."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import folder_paths

from ...wuerstchen_core.checkpoints import read_metadata
from ...wuerstchen_core.checkpoints.open import open_source
from ...wuerstchen_core.checkpoints.shipped import LORAS, shipped_path
from ...wuerstchen_core.checkpoints.source import CHECKPOINT
from ...wuerstchen_core.inference.comfyui_nodes import SHIPPED, SHIPPED_NAMES

DEMO, DEMO_V1 = SHIPPED["demo"], SHIPPED["demo-v1"]
LORA_FOLDER = "loras"
# Of loaders that offer all files of a folder; bundles are listed below.
_SHIPPED_IN = {LORA_FOLDER: [SHIPPED[name] for name in LORAS]}


def file_names(folder: str) -> list[str]:
    """Lists what ships, then the files in all ComfyUI folders of a kind, including those of extra_model_paths.yaml."""
    return [*_SHIPPED_IN.get(folder, ()), *folder_paths.get_filename_list(folder)]


def file_path(folder: str, name: str) -> Path:
    """Returns the path of a file in `file_names`; ValueError if it is missing."""
    if name in _SHIPPED_IN.get(folder, ()):
        return shipped_path(SHIPPED_NAMES[name])
    path = folder_paths.get_full_path(folder, name)
    if path is None:  # the workflow names a file that was moved or deleted
        raise ValueError(f"{name!r} is not in the {folder} folder: put it there, or choose another file")
    return Path(path)


def bundle_names() -> list[str]:
    """Lists the shipped model and the safetensors files of the checkpoints folders."""
    return [DEMO, *(name for name in file_names("checkpoints") if name.endswith(".safetensors"))]


def bundle_path(name: str) -> Path:
    """Returns the path of a file in `bundle_names` or `split_bundles`."""
    return shipped_path(SHIPPED_NAMES[name]) if name in (DEMO, DEMO_V1) else file_path("checkpoints", name)


def own_folder(folder: str, name: str) -> Path:
    """Returns the folder for files made from one in `file_names`: its own, or for a shipped one, the first."""
    shipped = name in _SHIPPED_IN.get(folder, ())
    return Path(folder_paths.get_folder_paths(folder)[0]) if shipped else file_path(folder, name).parent


def split_bundles() -> dict[str, tuple[str, ...]]:
    """Returns the parts of the files that are loaded part by part: bundles of v1, the shipped one first, and files of
    ComfyUI's CheckpointSave."""
    names = [DEMO_V1, *bundle_names()[1:]]
    return {name: parts for name in names if (parts := _split_parts(name))}


def _split_parts(name: str) -> tuple[str, ...]:
    try:
        path = bundle_path(name)
        status = path.stat()
        return _read_split_parts(path, status.st_mtime_ns, status.st_size)
    except Exception:  # missing or damaged in any way, which loading it reports: the list must not fail
        return ()


@lru_cache(maxsize=4096)
def _read_split_parts(path: Path, modified: int, size: int) -> tuple[str, ...]:
    """Reads the names of a file's parts from its header, once until the file changes; () for other files."""
    metadata = read_metadata(path)
    if metadata:
        return tuple(metadata.get("parts", {})) if metadata.get("version") == "v1" else ()
    source = open_source(path, headers_only=True)
    return tuple(source.networks) if source.layout == CHECKPOINT else ()


def embeddings() -> list[str]:
    """Lists the folders of textual inversion files."""
    return folder_paths.get_folder_paths("embeddings")
