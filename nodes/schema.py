"""Node schemas with the English texts of `locales/en`, and the inputs that several nodes share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from comfy_api.latest import io

from ..wuerstchen_core.inference.settings import LARGEST_SEED

# Names and tooltips by node id, in the form of the translations beside them.
TEXTS = json.loads((Path(__file__).parents[1] / "locales" / "en" / "nodeDefs.json").read_text(encoding="utf-8"))
SEARCH_WORDS = ("wuerstchen", "wurstchen", "wurst", "sausage", "cascade")  # find every node of this pack
SEED_MAX = LARGEST_SEED - 4096  # image i of a batch uses seed + i


def title(node_id: str) -> str:
    """Returns a node's display name."""
    return TEXTS[node_id]["display_name"]


def schema(
    node_id: str,
    category: str,
    *,
    inputs: Sequence[Any],
    outputs: Sequence[Any],
    search_aliases: Sequence[str],
    **options: Any,
) -> io.Schema:
    """Returns a node's schema with its texts; ComfyUI's node search finds it by `search_aliases` and SEARCH_WORDS."""
    texts = TEXTS[node_id]
    for item in inputs:
        item.tooltip = texts["inputs"][item.id]["tooltip"]
    for i, item in enumerate(outputs):
        item.display_name, item.tooltip = (texts["outputs"][str(i)][key] for key in ("name", "tooltip"))
    if any(field.name == "search_aliases" for field in fields(io.Schema)):  # missing in ComfyUI 0.3.64
        options["search_aliases"] = [*search_aliases, *SEARCH_WORDS]
    return io.Schema(
        node_id=node_id,
        display_name=title(node_id),
        category=f"Würstchen/{category}",
        description=texts["description"],
        inputs=list(inputs),
        outputs=list(outputs),
        **options,
    )


def seed_input() -> io.Int.Input:
    return io.Int.Input("seed", default=0, min=0, max=SEED_MAX, control_after_generate=True)


def steps_input(default: int) -> io.Int.Input:
    return io.Int.Input("steps", default=default, min=1, max=1000)


def cfg_input(default: float) -> io.Float.Input:
    return io.Float.Input("cfg", default=default, min=1.0, max=30.0, step=0.1)


def denoise_input() -> io.Float.Input:
    return io.Float.Input("denoise", default=1.0, min=0.0, max=1.0, step=0.01, optional=True)
