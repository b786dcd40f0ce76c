"""Workflows as the canvas saves them, turned into the form that ComfyUI runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from .client import REPOSITORY

NOTES = ("Note", "MarkdownNote")  # nodes of the canvas alone
ALWAYS, MUTED = 0, 2  # modes of a node
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")

WORKFLOWS = REPOSITORY / "workflows"
LORA = WORKFLOWS / "wuerstchen_demo_pink.safetensors"  # for models/loras; the workflow `lora` names it
RELEASED, RELEASED_V1 = "wuerstchen_v2_1024", "wuerstchen_v1_512"  # these need weights that do not ship


def names() -> list[str]:
    """Every workflow that ships."""
    return sorted(path.stem for path in WORKFLOWS.glob("*.json"))


def workflow(name: str) -> dict[str, Any]:
    """A workflow that ships, as the canvas saves it."""
    return json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))


def api_form(graph: Mapping[str, Any], object_info: Mapping[str, Any]) -> dict[str, Any]:
    """The prompt that the frontend would send for `graph`: without its notes and its muted nodes."""
    nodes = [node for node in graph["nodes"] if node["type"] not in NOTES and node["mode"] != MUTED]
    if bypassed := [node["id"] for node in nodes if node["mode"] != ALWAYS]:
        raise ValueError(f"nodes {bypassed} are bypassed, and what the frontend puts in their place is not known here")
    there = {node["id"] for node in nodes}
    sources = {link[0]: [str(link[1]), link[2]] for link in graph["links"] if link[1] in there}
    return {
        str(node["id"]): {"class_type": node["type"], "inputs": _inputs(node, object_info[node["type"]], sources)}
        for node in nodes
    }


def _inputs(node: Mapping[str, Any], info: Mapping[str, Any], sources: Mapping[int, Any]) -> dict[str, Any]:
    linked = {slot["name"]: sources[slot["link"]] for slot in node.get("inputs", []) if slot.get("link") in sources}
    values = list(node.get("widgets_values", []))
    inputs: dict[str, Any] = {}
    for section in ("required", "optional"):
        for name in info["input_order"].get(section, []):
            kind, options = (*info["input"][section][name], {})[:2]
            if isinstance(kind, list) or (kind in WIDGETS and not options.get("forceInput")):
                inputs[name] = values.pop(0)
                if options.get("control_after_generate"):
                    values.pop(0)
            if name in linked:
                inputs[name] = linked.pop(name)
    if values or linked:
        raise ValueError(f"node {node['id']} ({node['type']}) has more than its inputs: {values}, {list(linked)}")
    return inputs


def halves(picture: Image.Image) -> list[Image.Image]:
    """The left and the right half of a picture, without the few pixels beside their seam that Stage A blends."""
    pixels, middle, blended = np.array(picture.convert("RGB")), picture.width // 2, 4
    pixels[:, middle - blended : middle] = pixels[:, [middle - blended - 1]]
    pixels[:, middle : middle + blended] = pixels[:, [middle + blended]]
    return [Image.fromarray(half) for half in (pixels[:, :middle], pixels[:, middle:])]
