"""Names and settings of the untrained models of the host tests, and the lookup of a prompt's nodes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tools.comfyui.client import Outcome
from tools.comfyui.graphs import NEWER

Graph = dict[str, Any]  # a prompt in the form of ComfyUI's API
Generate = Callable[[Graph], Outcome]

TINY, HALF, FOREIGN, V1 = "tiny.safetensors", "half.safetensors", "foreign.safetensors", "v1.safetensors"
OUTLINE = "outline.safetensors"  # a ControlNet of TINY
SAMPLING = {
    "width": 256,
    "height": 192,
    "schedule": "linear",
    "prior_steps": 4,
    "prior_guidance": 5.0,
    "decoder_steps": 3,
}
SAMPLING_V1 = {**SAMPLING, "decoder_guidance": 2.0}


def skip_if_too_old(name: str, object_info: dict[str, Any]) -> None:
    """Skips a test of a workflow that needs a newer ComfyUI than this."""
    if name in NEWER and "SaveLoRA" not in object_info:
        pytest.skip("Train LoRA and Save LoRA have another form in this ComfyUI")


def find(graph: dict[str, Any], kind: str) -> dict[str, Any]:
    """Returns the inputs of the first node of a class."""
    return next(node["inputs"] for node in graph.values() if node["class_type"] == kind)
