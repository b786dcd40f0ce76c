"""Schemas in the words that both hosts know."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from comfy_api.latest import io

WORDS = ("wuerstchen", "wurstchen", "wurst", "sausage", "cascade")  # what a user may type for any of the nodes


def schema(*, search_aliases: Sequence[str], **options: Any) -> io.Schema:
    """The schema of a node, which the host's search also finds by these words and `WORDS`, where the host can."""
    if any(field.name == "search_aliases" for field in fields(io.Schema)):  # not in the older host
        options["search_aliases"] = [*search_aliases, *WORDS]
    return io.Schema(**options)
