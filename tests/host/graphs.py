"""Workflows as the canvas saves them, turned into the form that ComfyUI runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from comfyui import REPOSITORY

NOTES = ("Note", "MarkdownNote")  # nodes of the canvas alone
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")


def workflow(name: str) -> dict[str, Any]:
    """A workflow that ships, as the canvas saves it."""
    path: Path = REPOSITORY / "workflows" / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8"))


def api_form(graph: Mapping[str, Any], object_info: Mapping[str, Any]) -> dict[str, Any]:
    """The prompt that the frontend would send for `graph`."""
    sources = {link[0]: [str(link[1]), link[2]] for link in graph["links"]}
    nodes = [node for node in graph["nodes"] if node["type"] not in NOTES]
    return {
        str(node["id"]): {"class_type": node["type"], "inputs": _inputs(node, object_info[node["type"]], sources)}
        for node in nodes
    }


def _inputs(node: Mapping[str, Any], info: Mapping[str, Any], sources: Mapping[int, Any]) -> dict[str, Any]:
    linked = {slot["name"]: sources[slot["link"]] for slot in node.get("inputs", []) if slot.get("link") is not None}
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
