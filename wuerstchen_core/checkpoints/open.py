"""From a source (file, folder, bundle, or the shipped model) to its parts."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from .bundle import parse_metadata
from .components import PARTS, Part
from .folders import open_folder
from .release import check_version
from .single import open_file
from .source import Source
from .weight_files import read_file_metadata

SHIPPED = {"demo": "wuerstchen-demo.safetensors", "demo-v1": "wuerstchen-demo-v1.safetensors"}


def demo_path(name: str = "demo") -> Path:
    """The bundle that ships with this package: "demo", of v2, or "demo-v1"."""
    return Path(__file__).parent.parent / "demo" / SHIPPED[name]


def source_path(source: str | os.PathLike[str]) -> Path:
    """The file or folder that a source names. ValueError if it does not exist."""
    path = demo_path(source) if isinstance(source, str) and source in SHIPPED else Path(source)
    if not path.exists():
        raise ValueError(
            f"{path} does not exist: give a weight file, a diffusers folder, or {' or '.join(map(repr, SHIPPED))}"
        )
    return path


def open_source(
    source: str | os.PathLike[str], wanted: str | None = None, headers_only: bool = False, version: str = "auto"
) -> Source:
    """Open "demo", "demo-v1", a file or a folder; of a folder only the part `wanted`, if one is named.

    `version` ("v1" or "v2") decides about a prior where nothing else tells the two apart (see `versions`).
    """
    check_version(version)
    if wanted is not None and wanted not in PARTS:
        raise ValueError(f"{wanted!r} is no part of a model: the parts are {', '.join(PARTS)}")
    path = source_path(source)
    opened = open_folder(path, wanted, headers_only) if path.is_dir() else open_file(path, headers_only)
    return replace(opened, version=version, by_headers=headers_only)


def read_part(source: str | os.PathLike[str], name: str, version: str = "auto") -> Part:
    """One part of a source: a .safetensors or PyTorch file (the original's, diffusers', transformers', open_clip's,
    ComfyUI's), a folder (a pipeline's, one component's, or of bundles), a bundle, "demo" or "demo-v1"; `version` as for
    `open_source`.

    ValueError if the source has no such part or can't be read.
    """
    return open_source(source, name, version=version).part(name)


def read_metadata(source: str | os.PathLike[str]) -> dict[str, Any]:
    """A bundle's JSON; {} for every other source."""
    path = source_path(source)
    return {} if path.is_dir() else parse_metadata(path, read_file_metadata(path))
