"""One weight file of any kind: the parts of a bundle, or the networks that its keys tell."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .bundle import parse_metadata, split_bundle
from .components import kind_of
from .key_maps import LORA, foreign
from .lazy import all_as_they_are
from .quant import is_scaled, widened
from .rows import complete
from .source import BUNDLE, Network, Source, named, recognise
from .weight_files import read_weight_file


def open_file(path: Path, headers_only: bool, config: Mapping[str, Any] | None = None) -> Source:
    """Open a weight file, with the config.json beside it if it is a component of diffusers."""
    content = read_weight_file(path, headers_only)
    metadata = parse_metadata(path, content.metadata)
    bare = content.states.get("", {})
    bundled = split_bundle(bare) if foreign(bare) != LORA else None  # the keys of LoRA files may begin as a bundle's
    if bundled is None:
        return recognise(path, content, dict(config or {}), metadata)
    networks: dict[str, Network] = {}
    for name, stored in bundled.items():
        sizes = metadata.get("parts", {}).get(name)
        stored = complete(stored, sizes)
        networks |= named(name, Network(kind_of(name), widened(all_as_they_are(stored)), is_scaled(stored), sizes))
    return Source(path, BUNDLE, networks, metadata)
