"""Where the user's files are: the host's folders, read and never changed."""

from __future__ import annotations

from pathlib import Path

import folder_paths

from ...wuerstchen_core.checkpoints import demo_path

DEMO = "Würstchen demo (shipped)"


def bundle_names() -> list[str]:
    """The shipped model, then the files of the checkpoints folders that can be bundles."""
    files = folder_paths.get_filename_list("checkpoints")
    return [DEMO, *(name for name in files if name.endswith(".safetensors"))]


def bundle_path(name: str) -> Path:
    """The file behind one of `bundle_names`."""
    if name == DEMO:
        return demo_path()
    path = folder_paths.get_full_path("checkpoints", name)
    if path is None:  # a workflow was saved before the file went away
        raise ValueError(f"there is no {name!r} in the checkpoints folder: put it there, or choose another bundle")
    return Path(path)


def embeddings() -> list[str]:
    """The folders of textual inversion files."""
    return folder_paths.get_folder_paths("embeddings")
