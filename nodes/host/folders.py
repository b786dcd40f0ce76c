"""Where the user's files are: the host's folders, read and never changed."""

from __future__ import annotations

from pathlib import Path

import folder_paths

from ...wuerstchen_core.checkpoints import demo_path

DEMO = "Würstchen demo (shipped)"


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
    """The file behind one of `bundle_names`."""
    return demo_path() if name == DEMO else file_path("checkpoints", name)


def embeddings() -> list[str]:
    """The folders of textual inversion files."""
    return folder_paths.get_folder_paths("embeddings")
