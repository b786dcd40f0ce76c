"""The texts of the nodes in English, German and Chinese."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from wuerstchen_core.checkpoints.components import BUNDLE_LOADER, COMPONENTS

LOCALES = Path(__file__).parents[1] / "locales"


def flatten(value: Any, path: str = "") -> dict[str, str]:
    """Returns the texts of nested tables by path, in order."""
    if isinstance(value, str):
        return {path: value}
    return {key: text for name, inner in value.items() for key, text in flatten(inner, f"{path}/{name}").items()}


def texts(language: str) -> dict[str, str]:
    return flatten(json.loads((LOCALES / language / "nodeDefs.json").read_text(encoding="utf-8")))


@pytest.mark.parametrize("language", ["de", "zh"])
def test_every_text_is_translated(language: str) -> None:
    translated, english = texts(language), texts("en")
    assert list(translated) == list(english)
    same = {path for path in english if translated[path] == english[path]}
    assert not [path for path in same if path.endswith(("tooltip", "description"))]


@pytest.mark.parametrize("language", ["en", "de", "zh"])
def test_explanations_are_sentences(language: str) -> None:
    for path, text in texts(language).items():
        assert text.strip() == text != "", path
        assert text.endswith((".", "。")) == path.endswith(("tooltip", "description")), path


def test_the_registry_names_the_nodes_as_they_are_displayed() -> None:
    names = {text for path, text in texts("en").items() if path.endswith("display_name")}
    assert {loader.node for loader in (BUNDLE_LOADER, *(part.loader for part in COMPONENTS.values()))} <= names
