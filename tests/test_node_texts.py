"""The texts of the nodes in English, German and Chinese."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from wuerstchen_core.checkpoints.components import BUNDLE_LOADER, COMPONENTS

LOCALES = Path(__file__).parents[1] / "locales"


def texts(language: str) -> dict[str, Any]:
    return json.loads((LOCALES / language / "nodeDefs.json").read_text(encoding="utf-8"))


def paths(value: Any, path: str = "") -> Iterator[str]:
    """Yields the path of every text, in order."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from paths(inner, f"{path}/{key}")
    else:
        assert isinstance(value, str) and value.strip(), path
        yield path


@pytest.mark.parametrize("language", ["de", "zh"])
def test_translations_have_the_keys_of_the_english_texts(language: str) -> None:
    assert list(paths(texts(language))) == list(paths(texts("en")))


@pytest.mark.parametrize("language", ["de", "zh"])
def test_no_description_is_left_in_english(language: str) -> None:
    translated, english = texts(language), texts("en")
    assert not [node for node in english if translated[node]["description"] == english[node]["description"]]


def test_the_registry_names_the_nodes_as_they_are_displayed() -> None:
    loaders = [BUNDLE_LOADER, *(component.loader for component in COMPONENTS.values())]
    assert {loader.node for loader in loaders} <= {node["display_name"] for node in texts("en").values()}
