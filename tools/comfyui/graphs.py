"""Converts workflows from the canvas format to the prompt format that ComfyUI runs."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .client import REPOSITORY

NOTES = ("Note", "MarkdownNote")  # nodes that only the canvas has
ALWAYS, MUTED = 0, 2  # a node's mode
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")

WORKFLOWS = REPOSITORY / "workflows"
RELEASED, RELEASED_V1 = "v2_1024", "v1_512"  # need weights that do not ship
NEWER = ("train_lora",)  # need nodes that ComfyUI 0.3.64 has in another form


def files() -> dict[str, Path]:
    """Returns the files of the shipped workflows by name, in the order of the template browser.

    Their names are NUMBER_wuerstchen_NAME.json, or NUMBER_wuerstchen_NAME.app.json for one that opens in App Mode.
    """
    paths = sorted(WORKFLOWS.glob("*.json"))
    return {re.sub(r"^\d\d_wuerstchen_|\.app$", "", path.stem): path for path in paths}


def names() -> list[str]:
    """Returns the names of the shipped workflows, in the order of the template browser."""
    return list(files())


def picture_file(name: str) -> Path:
    """Returns the path of the picture that the template browser shows for a workflow."""
    return files()[name].with_suffix(".jpg")


def workflow(name: str) -> dict[str, Any]:
    """Returns a shipped workflow in the canvas format."""
    return json.loads(files()[name].read_text(encoding="utf-8"))


def api_form(graph: Mapping[str, Any], object_info: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the prompt that the frontend would send for `graph`, without notes and muted nodes.

    Raises ValueError for bypassed nodes, which are not supported, and for values that fit no input.
    """
    nodes = [node for node in graph["nodes"] if node["type"] not in NOTES and node["mode"] != MUTED]
    if bypassed := [node["id"] for node in nodes if node["mode"] != ALWAYS]:
        raise ValueError(f"nodes {bypassed} are bypassed, which is not supported: delete or mute them")
    ids = {node["id"] for node in nodes}
    sources = {link[0]: [str(link[1]), link[2]] for link in graph["links"] if link[1] in ids}
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
                if options.get("control_after_generate", name == "seed"):  # the frontend adds it to each `seed`
                    values.pop(0)
            if name in linked:
                inputs[name] = linked.pop(name)
    if values or linked:
        raise ValueError(f"node {node['id']} ({node['type']}) has unknown values {values} or links {list(linked)}")
    return inputs


def halves(picture: Image.Image) -> list[Image.Image]:
    """Returns the left and right half of an image; the pixels that Stage A blends at the seam are replaced."""
    pixels, middle, blended = np.array(picture.convert("RGB")), picture.width // 2, 4
    pixels[:, middle - blended : middle] = pixels[:, [middle - blended - 1]]
    pixels[:, middle : middle + blended] = pixels[:, [middle + blended]]
    return [Image.fromarray(half) for half in (pixels[:, :middle], pixels[:, middle:])]
