"""The ComfyUI nodes of the graphs in pictures' metadata, and graphs of them in the canvas format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# A graph in the form of ComfyUI's API: nodes by id, each with `class_type` and `inputs`. A link is [id, output index].
Prompt = dict[str, dict[str, Any]]

# The nodes' names of the files that ship. Never change these: saved workflows contain them.
SHIPPED = {
    "demo": "Würstchen demo (shipped)",
    "demo-v1": "Würstchen demo v1 (shipped)",
    "demo-pink": "Würstchen demo pink (shipped)",
}
SHIPPED_NAMES = {title: name for name, title in SHIPPED.items()}

CONTROLLED = {"seed": "fixed", "value": "fixed"}  # widgets that are followed by "control after generate"
COLUMN, ROW_GAP, TOP, WIDTH = 380, 50, 120, 320  # of the layout, in pixels


@dataclass(frozen=True)
class NodeType:
    """Names and types of a node's sockets, widgets and outputs, in order."""

    sockets: dict[str, str]
    widgets: dict[str, str]
    outputs: dict[str, str]


def _node(sockets: str, widgets: str, outputs: str) -> NodeType:
    """Parses "name:TYPE, name:TYPE" for each."""
    tables = (dict(item.strip().split(":") for item in text.split(",") if item) for text in (sockets, widgets, outputs))
    return NodeType(*tables)


# The order of the widgets is that of a saved graph's `widgets_values`.
NODES = {
    "WuerstchenBundleLoader": _node(
        "",
        "bundle:COMBO",
        "prior:MODEL, decoder:MODEL, prior clip:CLIP, decoder clip:CLIP, vae:VAE, image encoder:VAE",
    ),
    "WuerstchenModelLoader": _node("", "model_name:COMBO, weight_dtype:COMBO, version:COMBO", "model:MODEL"),
    "WuerstchenTokenDecoderLoader": _node(
        "", "model_name:COMBO, weight_dtype:COMBO", "token decoder:WUERSTCHEN_TOKEN_DECODER"
    ),
    "WuerstchenCLIPLoader": _node("", "clip_name:COMBO", "clip:CLIP"),
    "WuerstchenVAELoader": _node("", "vae_name:COMBO", "vae:VAE"),
    "WuerstchenLoraLoader": _node(
        "model:MODEL, clip:CLIP",
        "lora_name:COMBO, strength_model:FLOAT, strength_clip:FLOAT, save_converted:BOOLEAN",
        "model:MODEL, clip:CLIP",
    ),
    "WuerstchenControlNetLoader": _node("", "control_net_name:COMBO", "ControlNet:CONTROL_NET"),
    "ControlNetApplyAdvanced": _node(
        "positive:CONDITIONING, negative:CONDITIONING, control_net:CONTROL_NET, image:IMAGE, vae:VAE",
        "strength:FLOAT, start_percent:FLOAT, end_percent:FLOAT",
        "positive:CONDITIONING, negative:CONDITIONING",
    ),
    "WuerstchenTextEncode": _node(
        "prior_clip:CLIP, decoder_clip:CLIP", "text:STRING", "prior:CONDITIONING, decoder:CONDITIONING"
    ),
    "WuerstchenEmptyLatents": _node("", "width:INT, height:INT, batch_size:INT", "stage_c:LATENT, stage_b:LATENT"),
    "WuerstchenImageEncode": _node(
        "image_encoder:VAE, image:IMAGE, vae:VAE, mask:MASK", "", "stage_c:LATENT, stage_b:LATENT"
    ),
    "WuerstchenPriorSample": _node(
        "model:MODEL, positive:CONDITIONING, negative:CONDITIONING, stage_c:LATENT",
        "schedule:COMBO, steps:INT, cfg:FLOAT, seed:INT, denoise:FLOAT",
        "stage_c:LATENT",
    ),
    "WuerstchenDecoderConditioning": _node(
        "conditioning:CONDITIONING, stage_c:LATENT", "", "conditioning:CONDITIONING"
    ),
    "WuerstchenDecoderSample": _node(
        "model:MODEL, positive:CONDITIONING, stage_b:LATENT, negative:CONDITIONING",
        "steps:INT, cfg:FLOAT, seed:INT, denoise:FLOAT, reuse:INT",
        "stage_b:LATENT",
    ),
    "WuerstchenTokenDecoderSample": _node(
        "token_decoder:WUERSTCHEN_TOKEN_DECODER, positive:CONDITIONING, stage_b:LATENT, vae:VAE, negative:CONDITIONING",
        "steps:INT, cfg:FLOAT, cfg_end:FLOAT, temperature:FLOAT, temperature_end:FLOAT, mode:COMBO, seed:INT, "
        "denoise:FLOAT, reuse:INT",
        "stage_b:LATENT",
    ),
    "WuerstchenVAEDecode": _node("vae:VAE, stage_b:LATENT", "", "image:IMAGE"),
    "PrimitiveInt": _node("", "value:INT", "INT:INT"),
    "LoadImage": _node("", "image:COMBO", "IMAGE:IMAGE, MASK:MASK"),
    "SaveImage": _node("images:IMAGE", "filename_prefix:STRING", ""),
}


def is_link(value: Any) -> bool:
    return isinstance(value, list)


def canvas(prompt: Prompt, titles: Mapping[str, str]) -> dict[str, Any]:
    """Returns a graph in the format of ComfyUI's canvas, with its nodes in columns; `titles` are by id."""
    links: list[list[Any]] = []
    nodes = {key: _canvas_node(key, node["class_type"], titles) for key, node in prompt.items()}
    columns: dict[int, int] = {}  # where the next node of each column begins
    for order, (key, node) in enumerate(prompt.items()):
        kind, drawn = NODES[node["class_type"]], nodes[key]
        sources = [value[0] for value in node["inputs"].values() if is_link(value)]
        column = max((nodes[source]["pos"][0] // COLUMN + 1 for source in sources), default=0)
        top = columns.get(column, TOP)
        drawn |= {"order": order, "pos": [40 + column * COLUMN, top]}
        columns[column] = top + drawn["size"][1] + ROW_GAP
        for slot, item in enumerate(drawn["inputs"]):
            value = node["inputs"].get(item["name"])
            if is_link(value):
                link = len(links) + 1
                links.append([link, int(value[0]), value[1], int(key), slot, item["type"]])
                nodes[value[0]]["outputs"][value[1]]["links"].append(link)
                item["link"] = link
        for name in kind.widgets:
            value = node["inputs"][name]
            # A linked widget keeps a value of its own, which is not used.
            drawn["widgets_values"].append(prompt[value[0]]["inputs"]["value"] if is_link(value) else value)
            drawn["widgets_values"] += [CONTROLLED[name]] if name in CONTROLLED else []
    return {
        "last_node_id": max(map(int, prompt)),
        "last_link_id": len(links),
        "nodes": list(nodes.values()),
        "links": links,
        "groups": [],
        "config": {},
        "extra": {},
        "version": 0.4,
    }


def _canvas_node(key: str, name: str, titles: Mapping[str, str]) -> dict[str, Any]:
    """Returns a node of the canvas format without values, links and position."""
    kind = NODES[name]
    inputs: list[dict[str, Any]] = [{"name": x, "type": type, "link": None} for x, type in kind.sockets.items()]
    inputs += [{"name": x, "type": type, "link": None, "widget": {"name": x}} for x, type in kind.widgets.items()]
    rows = max(len(kind.sockets), len(kind.outputs)) + len(kind.widgets) + (3 if "text" in kind.widgets else 0)
    pack = "wuerstchen" if name.startswith("Wuerstchen") else "comfy-core"
    node = {
        "id": int(key),
        "type": name,
        "size": [WIDTH, 60 + 26 * rows + (300 if name in ("SaveImage", "LoadImage") else 0)],
        "flags": {},
        "mode": 0,
        "inputs": inputs,
        "outputs": [{"name": x, "type": type, "links": []} for x, type in kind.outputs.items()],
        "properties": {"cnr_id": pack, "Node name for S&R": name},
        "widgets_values": [],
    }
    return node | ({"title": titles[key]} if key in titles else {})
