"""Node schemas with the English texts of `locales/en`, and the inputs that several nodes share."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import wraps
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from comfy_api.latest import io

from ..wuerstchen_core.common.text import listed
from ..wuerstchen_core.inference.settings import LARGEST_SEED, SamplingSettings

# Names and tooltips by node id, in the form of the translations beside them.
TEXTS = json.loads((Path(__file__).parents[1] / "locales" / "en" / "nodeDefs.json").read_text(encoding="utf-8"))
SEARCH_WORDS = ("wuerstchen", "wurstchen", "wurst", "sausage", "cascade")  # find every node of this pack
MOST_LISTED = 120  # characters of choices, of which an error names all
SEED_MAX = LARGEST_SEED - 4096  # image i of a batch uses seed + i


def title(node_id: str) -> str:
    """Returns a node's display name."""
    return TEXTS[node_id]["display_name"]


class Node(io.ComfyNode):
    """A node that checks its inputs by its schema before it runs; ComfyUI checks widgets only, and no links."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        execute = cls.execute.__func__
        if hasattr(execute, "__wrapped__"):  # ComfyUI's copies of a node, whose attributes cannot be set
            return

        @wraps(execute)
        def checked(cls: type[Node], *args: Any, **values: Any) -> io.NodeOutput:
            check_values(cls.define_schema(), values)
            return execute(cls, *args, **values)

        cls.execute = classmethod(checked)


def check_values(node: io.Schema, values: Mapping[str, Any]) -> None:
    """Raises ValueError unless numbers, switches, texts and choices are what the schema's widgets allow."""
    for item in node.inputs:
        value = values.get(item.id)
        if item.id not in values or (value is None and item.optional):
            continue
        expected = ""
        if value is None:
            expected = "an input"
        elif isinstance(item, io.Int.Input | io.Float.Input):
            kind = Integral if isinstance(item, io.Int.Input) else Real
            if not isinstance(value, kind) or not item.min <= value <= item.max:  # also false for NaN
                expected = f"a {'whole ' if kind is Integral else ''}number from {item.min:g} to {item.max:g}"
        elif isinstance(item, io.Combo.Input):
            if value not in item.options:
                most = len(item.options) if sum(map(len, item.options)) <= MOST_LISTED else 4
                expected = f"one of {listed(item.options, most)}" if item.options else "a file, of which none was found"
        elif isinstance(item, io.Boolean.Input) and not isinstance(value, bool):
            expected = "true or false"
        elif isinstance(item, io.String.Input) and not isinstance(value, str):
            expected = "a text"
        if expected:
            found = repr(value) if isinstance(value, str | Real | None) else f"a {type(value).__name__}"
            raise ValueError(
                f"{node.display_name} got {found[:60]} as {item.id}, but needs {expected}: change the input"
            )


def schema(
    node_id: str,
    category: str,
    *,
    inputs: Sequence[Any],
    outputs: Sequence[Any],
    search_aliases: Sequence[str],
    **options: Any,
) -> io.Schema:
    """Returns a node's schema with its texts; ComfyUI's node search finds it by `search_aliases` and SEARCH_WORDS."""
    texts = TEXTS[node_id]
    for item in inputs:
        item.tooltip = texts["inputs"][item.id]["tooltip"]
    for i, item in enumerate(outputs):
        item.display_name, item.tooltip = (texts["outputs"][str(i)][key] for key in ("name", "tooltip"))
    if any(field.name == "search_aliases" for field in fields(io.Schema)):  # missing in ComfyUI 0.3.64
        options["search_aliases"] = [*search_aliases, *SEARCH_WORDS]
    return io.Schema(
        node_id=node_id,
        display_name=title(node_id),
        category=f"Würstchen/{category}",
        description=texts["description"],
        inputs=list(inputs),
        outputs=list(outputs),
        **options,
    )


def seed_input() -> io.Int.Input:
    return io.Int.Input("seed", default=0, min=0, max=SEED_MAX, control_after_generate=True)


def steps_input(default: int) -> io.Int.Input:
    return io.Int.Input("steps", default=default, min=1, max=1000)


def cfg_input(default: float) -> io.Float.Input:
    return io.Float.Input("cfg", default=default, min=1.0, max=30.0, step=0.1)


def denoise_input() -> io.Float.Input:
    return io.Float.Input("denoise", default=1.0, min=0.0, max=1.0, step=0.01, optional=True)


def reuse_input() -> io.Int.Input:
    return io.Int.Input("reuse", default=SamplingSettings.decoder_reuse, min=1, max=100, optional=True)
