"""Where the user's files are: the host's folders, read and never changed."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import folder_paths

from ...wuerstchen_core.checkpoints import demo_path, read_metadata

DEMO = "Würstchen demo (shipped)"
DEMO_V1 = "Würstchen demo v1 (shipped)"


def file_names(folder: str) -> list[str]:
    """The files in all of the host's folders of one kind, the user's own among them; read anew when one changed."""
    return folder_paths.get_filename_list(folder)


def file_path(folder: str, name: str) -> Path:
    """The file behind one of `file_names`."""
    path = folder_paths.get_full_path(folder, name)
    if path is None:  # a workflow was saved before the file went away
        raise ValueError(f"there is no {name!r} in the {folder} folder: put it there, or choose another file")
    return Path(path)


def bundle_names() -> list[str]:
    """The shipped model, then the files of the checkpoints folders that can be bundles."""
    return [DEMO, *(name for name in file_names("checkpoints") if name.endswith(".safetensors"))]


def bundle_path(name: str) -> Path:
    """The file behind one of `bundle_names`, or of `v1_bundles`."""
    shipped = {DEMO: demo_path(), DEMO_V1: demo_path("demo-v1")}
    return shipped.get(name) or file_path("checkpoints", name)


def v1_bundles() -> dict[str, tuple[str, ...]]:
    """The bundles of v1, the shipped one first, and the names of the parts that each has."""
    names = [name for name in bundle_names() if name != DEMO]
    held = {name: _v1_parts(name) for name in (DEMO_V1, *names)}
    return {name: parts for name, parts in held.items() if parts}


def _v1_parts(name: str) -> tuple[str, ...]:
    try:
        path = bundle_path(name)
        status = path.stat()
        return _read_v1_parts(path, status.st_mtime_ns, status.st_size)
    except (OSError, ValueError):  # gone, a dead link, or damaged: whoever chooses it is told
        return ()


@lru_cache(maxsize=4096)
def _read_v1_parts(path: Path, changed: int, size: int) -> tuple[str, ...]:
    """The parts that a file's header names if it is a bundle of v1; read once as long as the file does not change."""
    metadata = read_metadata(path)
    return tuple(metadata.get("parts", {})) if metadata.get("version") == "v1" else ()


def embeddings() -> list[str]:
    """The folders of textual inversion files."""
    return folder_paths.get_folder_paths("embeddings")
