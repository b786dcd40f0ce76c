"""Reads and writes weights in every published layout."""

from __future__ import annotations

from .build import (
    build_part,
    load_control_net,
    load_decoder,
    load_image_encoder,
    load_prior,
    load_text_encoder,
    load_token_decoder,
    load_vqgan,
)
from .bundle import save_bundle
from .components import PARTS, PARTS_OF, Part
from .inspect import describe
from .open import read_metadata, read_part
from .shipped import demo_path

__all__ = [
    "PARTS",
    "PARTS_OF",
    "Part",
    "build_part",
    "demo_path",
    "describe",
    "load_control_net",
    "load_decoder",
    "load_image_encoder",
    "load_prior",
    "load_text_encoder",
    "load_token_decoder",
    "load_vqgan",
    "read_metadata",
    "read_part",
    "save_bundle",
]
