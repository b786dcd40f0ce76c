"""The texts of the nodes in every language."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from wuerstchen_core.checkpoints.components import BUNDLE_LOADER, COMPONENTS

LOCALES = Path(__file__).parents[1] / "locales"
LANGUAGES = sorted(path.name for path in LOCALES.iterdir())
TRANSLATIONS = [language for language in LANGUAGES if language != "en"]

NUMBER = re.compile(r"(?<![\w.,])\d+(?:[.,]\d+)?", re.ASCII)
# File names, folders, products, and the choices that a tooltip explains: the same in every language.
KEPT = re.compile(
    r"models/\w+|\w+\.(?:pt|safetensors)|embedding:|Stage [ABC]|CLIP-\w+|\bfp(?:8|32)\b|DDIM|LoRA\b|clip_g|stage_a|"
    r"vqgan\b|ComfyUI|SamplerCustom|ModelSave|SDXL|SD3|Stable \w+|LAION|OneTrainer|Kohya|DPM-Solver\+\+\(2M\)|"
    r"\b(?:original|diffusers|linear|fast|ddpm|ddim|dpmpp_2m|default|multinomial|argmax|quantised)(?=\s?[:：])|\bauto\b",
    re.ASCII,
)


def flatten(value: Any, path: str = "") -> dict[str, str]:
    """Returns the texts of nested tables by path, in order."""
    if isinstance(value, str):
        return {path: value}
    return {key: text for name, inner in value.items() for key, text in flatten(inner, f"{path}/{name}").items()}


def texts(language: str) -> dict[str, str]:
    return flatten(json.loads((LOCALES / language / "nodeDefs.json").read_text(encoding="utf-8")))


def is_sentence(path: str) -> bool:
    return path.endswith(("tooltip", "description"))


def numbers(text: str) -> set[str]:
    text = re.sub(r"\d+ ?[月월]", "", text)  # a month, which other languages write as a word
    return {number.replace(",", ".") for number in NUMBER.findall(text)}


def nodes_named(text: str, display_names: dict[str, str]) -> set[str]:
    """Returns the nodes whose names a text quotes; a name inside another name does not count."""
    found = set()
    for node in sorted(display_names, key=lambda node: -len(display_names[node])):
        if display_names[node] in text:
            found.add(node)
            text = text.replace(display_names[node], "")
    return found


def display_names(language: str) -> dict[str, str]:
    return {path.split("/")[1]: text for path, text in texts(language).items() if path.endswith("display_name")}


@pytest.mark.parametrize("language", TRANSLATIONS)
def test_every_text_is_translated(language: str) -> None:
    translated, english = texts(language), texts("en")
    assert list(translated) == list(english)
    assert not [path for path in english if translated[path] == english[path] and is_sentence(path)]


@pytest.mark.parametrize("language", TRANSLATIONS)
def test_translations_state_the_same_facts(language: str) -> None:
    english, translated = texts("en"), texts(language)
    for path in filter(is_sentence, english):
        assert numbers(translated[path]) == numbers(english[path]), path
        assert set(KEPT.findall(english[path])) <= set(KEPT.findall(translated[path])), path
        quoted = nodes_named(english[path], display_names("en"))
        assert nodes_named(translated[path], display_names(language)) == quoted, path


@pytest.mark.parametrize("language", TRANSLATIONS)
def test_one_text_has_one_translation(language: str) -> None:
    english, translated = texts("en"), texts(language)
    for path, text in english.items():
        first = next(other for other in english if english[other] == text and is_sentence(other) == is_sentence(path))
        assert translated[path] == translated[first], path


@pytest.mark.parametrize("language", LANGUAGES)
def test_explanations_are_sentences(language: str) -> None:
    for path, text in texts(language).items():
        assert text.strip() == text != "", path
        assert text.endswith((".", "。")) == is_sentence(path), path
        assert not set("{}|@") & set(text), path  # the frontend's message syntax


@pytest.mark.parametrize("language", LANGUAGES)
def test_node_names_differ(language: str) -> None:
    names = Counter(display_names(language).values())
    assert max(names.values()) == 1 and all(name.startswith("Würstchen") for name in names)


def test_the_registry_names_the_nodes_as_they_are_displayed() -> None:
    names = set(display_names("en").values())
    assert {loader.node for loader in (BUNDLE_LOADER, *(part.loader for part in COMPONENTS.values()))} <= names
