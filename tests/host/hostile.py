"""Prompts in which one input of one of our nodes is hostile."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bundles import OUTLINE, Graph
from node_list import NODES, list_inputs

DEMO = "Würstchen demo (shipped)"
V1 = "of Würstchen demo v1 (shipped)"
LINKS: dict[str, dict[str, tuple[str, int]]] = {
    "WuerstchenTextEncode": {
        "prior_clip": ("WuerstchenBundleLoader", 2),
        "decoder_clip": ("WuerstchenBundleLoader", 3),
    },
    "WuerstchenPriorSample": {
        "model": ("WuerstchenBundleLoader", 0),
        "positive": ("WuerstchenTextEncode", 0),
        "negative": ("WuerstchenTextEncode", 0),
        "stage_c": ("WuerstchenEmptyLatents", 0),
    },
    "WuerstchenDecoderConditioning": {
        "conditioning": ("WuerstchenTextEncode", 1),
        "stage_c": ("WuerstchenPriorSample", 0),
    },
    "WuerstchenDecoderSample": {
        "model": ("WuerstchenBundleLoader", 1),
        "positive": ("WuerstchenDecoderConditioning", 0),
        "stage_b": ("WuerstchenEmptyLatents", 1),
    },
    "WuerstchenVAEDecode": {"vae": ("WuerstchenBundleLoader", 4), "stage_b": ("WuerstchenDecoderSample", 0)},
    "WuerstchenScheduler": {"model": ("WuerstchenBundleLoader", 0)},
    "WuerstchenQuickLook": {"stage_c": ("WuerstchenPriorSample", 0)},
    "WuerstchenLoraLoader": {"model": ("WuerstchenBundleLoader", 0), "clip": ("WuerstchenBundleLoader", 2)},
    "WuerstchenImageEncode": {
        "image_encoder": ("WuerstchenBundleLoader", 5),
        "image": ("WuerstchenVAEDecode", 0),
        "vae": ("WuerstchenBundleLoader", 4),
    },
    "WuerstchenLatentInterpolate": {"first": ("WuerstchenPriorSample", 0), "second": ("WuerstchenPriorSample", 0)},
    "WuerstchenConditioningInterpolate": {
        "first": ("WuerstchenTextEncode", 0),
        "second": ("WuerstchenTextEncode", 0),
    },
    "WuerstchenTokenDecoderSample": {
        "token_decoder": ("WuerstchenTokenDecoderLoader", 0),
        "positive": ("conditioning", 0),
        "stage_b": ("WuerstchenEmptyLatents", 1),
        "vae": ("WuerstchenVAELoader", 0),
    },
}
VALUES: dict[str, dict[str, Any]] = {
    "WuerstchenBundleLoader": {"bundle": DEMO},
    "WuerstchenEmptyLatents": {"width": 128, "height": 128},
    "WuerstchenPriorSample": {"steps": 1, "schedule": "linear"},
    "WuerstchenDecoderSample": {"steps": 1},
    "WuerstchenTokenDecoderSample": {"steps": 1, "cfg": 1.0, "cfg_end": 1.0},
    "WuerstchenModelLoader": {"model_name": f"prior {V1}"},
    "WuerstchenCLIPLoader": {"clip_name": f"text tower {V1}"},
    "WuerstchenVAELoader": {"vae_name": f"Stage A {V1}"},
    "WuerstchenTokenDecoderLoader": {"model_name": f"token decoder {V1}"},
    "WuerstchenControlNetLoader": {"control_net_name": OUTLINE},
}
LINKS |= {  # the conditioning of v1's Stage B
    "text": {"prior_clip": ("WuerstchenCLIPLoader", 0), "decoder_clip": ("WuerstchenCLIPLoader", 0)},
    "stage c": {
        "model": ("WuerstchenModelLoader", 0),
        "positive": ("text", 0),
        "negative": ("text", 0),
        "stage_c": ("WuerstchenEmptyLatents", 0),
    },
    "conditioning": {"conditioning": ("text", 1), "stage_c": ("stage c", 0)},
}
CLASSES = {
    "text": "WuerstchenTextEncode",
    "stage c": "WuerstchenPriorSample",
    "conditioning": "WuerstchenDecoderConditioning",
}


def prompt(node: str, object_info: Mapping[str, Any]) -> Graph:
    """Returns a prompt that runs a node of ours, by its class, with all that it needs."""
    graph: Graph = {"sink": {"class_type": "ProbeSink", "inputs": {"value": [node, 0]}}}
    needed = [node]
    while needed:
        key = needed.pop()
        if key in graph:
            continue
        kind = CLASSES.get(key, key)
        widgets = {name: default(spec) for name, *spec in list_inputs(object_info[kind])}
        inputs = {name: value for name, value in widgets.items() if value is not None} | VALUES.get(kind, {})
        graph[key] = {
            "class_type": kind,
            "inputs": inputs | {name: list(link) for name, link in LINKS.get(key, {}).items()},
        }
        needed += [link[0] for link in graph[key]["inputs"].values() if isinstance(link, list)]
    return graph


def default(spec: list[Any]) -> Any:
    """Returns the value of an untouched widget; None for a socket."""
    kind, options = spec
    choices = kind if isinstance(kind, list) else options.get("options")
    return options.get("default", choices[0] if choices else None)


def hostile_texts(outside: Path) -> list[str]:
    """Returns texts that name files of a folder outside ComfyUI's, would run code, or are odd."""
    climb = "../" * 20 + outside.as_posix().lstrip("/")
    names = [f"{start}/{name}" for start in (climb, outside.as_posix()) for name in ("secret.safetensors", "secret.pt")]
    labelled = [f"{part} of {names[0]}" for part in ("prior", "Stage A", "token decoder", "text tower")]
    code = f"touch {outside}/run"
    return [
        *names,
        *(f"embedding:{name}" for name in (*names, f"{climb}/secret", "..", "/", "a/../../..")),
        *labelled,
        names[0].replace("/", "\\"),
        names[0].replace("..", "%2e%2e"),
        f"file://{names[2]}",
        f"{DEMO}/../{names[0]}",
        f"{names[0]}\0.safetensors",
        "\0", "", ".", "..", "/", "~", "a\nb", "\x1b[31mred\x1b[0m", "\u202egnp.exe", "\ud800", "CON", "x" * 5000,
        f"$({code})", f"`{code}`", f"__import__('os').system({code!r})", "{{7*7}}", "%s%n", "(" * 300 + "a" + ")" * 300,
        "embedding:" * 500,
    ]  # fmt: skip


ODD: tuple[Any, ...] = (None, True, -1, 10**30, {}, {"__value__": [1]}, [], [[1, 2]], ["a", 1])
NUMBERS: tuple[Any, ...] = (
    float("nan"), float("inf"), -float("inf"), 1e308, -1e308, 10**30, -(10**30), 0.5, "1", "x", "NaN", "", "../x",
)  # fmt: skip


def cases(object_info: Mapping[str, Any], outside: Path) -> Iterator[tuple[str, str, str, Any, bool]]:
    """Yields node, input, the input's type, a hostile value, and True if the value comes from another node."""
    for node in NODES:
        for name, kind, options in list_inputs(object_info[node]):
            if default([kind, options]) is None and not isinstance(kind, list):
                continue
            kind = "COMBO" if isinstance(kind, list) else kind
            values = NUMBERS if kind in ("INT", "FLOAT", "BOOLEAN") else hostile_texts(outside)
            for value in (*values, *ODD):
                for linked in (False, True):
                    yield node, name, kind, value, linked


def spoil(graph: Graph, node: str, name: str, value: Any, linked: bool) -> None:
    """Sets an input of a node to a value, or connects it to a node with that value."""
    if linked:
        graph["value"] = {"class_type": "ProbeValue", "inputs": {"json": json.dumps(value)}}
    graph[node]["inputs"][name] = ["value", 0] if linked else value
