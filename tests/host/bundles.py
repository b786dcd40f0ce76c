"""Names and settings of the untrained models in every ComfyUI of the tests, and nodes of a graph by their kind."""

from __future__ import annotations

from typing import Any

TINY, HALF, FOREIGN, V1 = "tiny.safetensors", "half.safetensors", "foreign.safetensors", "v1.safetensors"
SAMPLING = {
    "width": 256,
    "height": 192,
    "schedule": "linear",
    "prior_steps": 4,
    "prior_guidance": 5.0,
    "decoder_steps": 3,
}
SAMPLING_V1 = {**SAMPLING, "decoder_guidance": 2.0}


def find(graph: dict[str, Any], kind: str) -> dict[str, Any]:
    """The inputs of the first node of a kind."""
    return next(node["inputs"] for node in graph.values() if node["class_type"] == kind)
