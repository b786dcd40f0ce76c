"""Translations of the nodes are complete: the same texts as the English schemas, in every language."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tools.comfyui.client import REPOSITORY

LANGUAGES = sorted(path.name for path in (REPOSITORY / "locales").iterdir())


def keys(table: dict[str, Any], path: tuple[str, ...] = ()) -> set[tuple[str, ...]]:
    """Returns the paths of all texts in nested tables."""
    found: set[tuple[str, ...]] = set()
    for key, value in table.items():
        found |= keys(value, (*path, key)) if isinstance(value, dict) else {(*path, key)}
    return found


def texts(info: dict[str, Any]) -> dict[str, Any]:
    """Returns the English texts of a node in the form of a translation."""
    inputs = {**info["input"].get("required", {}), **info["input"].get("optional", {})}
    tooltips = {name: spec[1].get("tooltip") for name, spec in inputs.items() if len(spec) > 1}
    return {
        "display_name": info["display_name"],
        "description": info["description"],
        "inputs": {
            name: {"name": name} | ({"tooltip": tooltips[name]} if tooltips.get(name) else {}) for name in inputs
        },
        "outputs": {
            str(i): {"name": name, "tooltip": tooltip}
            for i, (name, tooltip) in enumerate(zip(info["output_name"], info["output_tooltips"], strict=True))
        },
    }


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_translation_has_the_texts_of_every_node(object_info: dict[str, Any], language: str) -> None:
    translation = json.loads((REPOSITORY / "locales" / language / "nodeDefs.json").read_text("utf-8"))
    ours = {name: texts(info) for name, info in object_info.items() if name.startswith("Wuerstchen")}
    assert keys(translation) == keys(ours)


@pytest.mark.parametrize("language", LANGUAGES)
def test_no_translation_is_left_in_english(object_info: dict[str, Any], language: str) -> None:
    translation = json.loads((REPOSITORY / "locales" / language / "nodeDefs.json").read_text("utf-8"))
    for name, node in translation.items():
        assert node["description"] != object_info[name]["description"], name
