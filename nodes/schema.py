"""Node schemas for all supported ComfyUI versions, and the inputs that several nodes share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from comfy_api.latest import io

from ..wuerstchen_core.inference.settings import LARGEST_SEED

SEARCH_WORDS = ("wuerstchen", "wurstchen", "wurst", "sausage", "cascade")  # find every node of this pack
SEED_MAX = LARGEST_SEED - 4096  # image i of a batch uses seed + i


def schema(*, search_aliases: Sequence[str], **options: Any) -> io.Schema:
    """Returns a node's schema; ComfyUI's node search finds it by `search_aliases` and SEARCH_WORDS."""
    if any(field.name == "search_aliases" for field in fields(io.Schema)):  # missing in ComfyUI 0.3.64
        options["search_aliases"] = [*search_aliases, *SEARCH_WORDS]
    return io.Schema(**options)


def seed_input() -> io.Int.Input:
    return io.Int.Input(
        "seed",
        default=0,
        min=0,
        max=SEED_MAX,
        control_after_generate=True,
        tooltip="Seed of the noise; image i of a batch uses seed + i. Würstchen's command line gives the same image.",
    )


def steps_input(default: int, tooltip: str) -> io.Int.Input:
    return io.Int.Input("steps", default=default, min=1, max=1000, tooltip=tooltip)


def cfg_input(default: float, tooltip: str) -> io.Float.Input:
    return io.Float.Input("cfg", default=default, min=1.0, max=30.0, step=0.1, tooltip=tooltip)


def denoise_input(tooltip: str) -> io.Float.Input:
    return io.Float.Input("denoise", default=1.0, min=0.0, max=1.0, step=0.01, optional=True, tooltip=tooltip)


def start_input(stage: str) -> io.Latent.Input:
    return io.Latent.Input(
        stage,
        tooltip=f"The {stage} output of Würstchen Empty Latents, or of Würstchen Image Encode to start from an image. "
        "With a mask, only the masked area is regenerated.",
    )
