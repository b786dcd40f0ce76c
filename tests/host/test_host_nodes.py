"""What ComfyUI says of the nodes: the names that saved workflows depend on; every input is explained and bounded."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest

from tools.comfyui.client import PACK, Server
from tools.comfyui.graphs import names, workflow

# Frozen: ids, inputs and outputs in order. Later additions come last.
NODES = {
    "WuerstchenBundleLoader": (
        "bundle",
        "prior:MODEL decoder:MODEL prior clip:CLIP decoder clip:CLIP vae:VAE image encoder:VAE",
    ),
    "WuerstchenTextEncode": ("prior_clip decoder_clip text", "prior:CONDITIONING decoder:CONDITIONING"),
    "WuerstchenEmptyLatents": ("width height batch_size", "stage_c:LATENT stage_b:LATENT"),
    "WuerstchenPriorSample": ("model positive negative stage_c schedule steps cfg seed denoise", "stage_c:LATENT"),
    "WuerstchenDecoderConditioning": ("conditioning stage_c", "conditioning:CONDITIONING"),
    "WuerstchenDecoderSample": ("model positive stage_b steps cfg seed negative denoise", "stage_b:LATENT"),
    "WuerstchenVAEDecode": ("vae stage_b", "image:IMAGE"),
    "WuerstchenScheduler": ("model schedule steps", "sigmas:SIGMAS"),
    "WuerstchenSampler": ("sampler_name", "sampler:SAMPLER"),
    "WuerstchenQuickLook": ("stage_c scale", "image:IMAGE"),
    "WuerstchenModelLoader": ("model_name weight_dtype version", "model:MODEL"),
    "WuerstchenCLIPLoader": ("clip_name", "clip:CLIP"),
    "WuerstchenVAELoader": ("vae_name", "vae:VAE"),
    "WuerstchenLoraLoader": (
        "model lora_name strength_model strength_clip save_converted clip",
        "model:MODEL clip:CLIP",
    ),
    "WuerstchenImageEncode": ("image_encoder image vae mask", "stage_c:LATENT stage_b:LATENT"),
    "WuerstchenLatentInterpolate": ("first second factor", "latent:LATENT"),
    "WuerstchenConditioningInterpolate": ("first second factor", "conditioning:CONDITIONING"),
    "WuerstchenTokenDecoderLoader": ("model_name weight_dtype", "token decoder:WUERSTCHEN_TOKEN_DECODER"),
    "WuerstchenTokenDecoderSample": (
        "token_decoder positive stage_b vae steps cfg cfg_end temperature temperature_end mode seed negative denoise",
        "stage_b:LATENT",
    ),
}


def _inputs(info: dict[str, Any]) -> list[tuple[str, Any, dict[str, Any]]]:
    return [
        (name, *(*info["input"][section][name], {})[:2])
        for section in ("required", "optional")
        for name in info["input_order"].get(section, [])
    ]


def test_the_pack_is_imported(server: Server, object_info: dict[str, Any]) -> None:
    log = server.log()
    assert "IMPORT FAILED" not in log and PACK in log
    ours = [name for name, info in object_info.items() if PACK in info["python_module"]]
    assert ours == list(NODES)


@pytest.mark.parametrize("node", NODES)
def test_ids_inputs_and_outputs_are_frozen(object_info: dict[str, Any], node: str) -> None:
    inputs, outputs = NODES[node]
    info = object_info[node]
    assert " ".join(name for name, _, _ in _inputs(info)) == inputs
    shown = zip(info["output_name"], info["output"], strict=True)
    assert " ".join(f"{name}:{kind}" for name, kind in shown) == outputs


@pytest.mark.parametrize("node", NODES)
def test_everything_is_explained_and_bounded(object_info: dict[str, Any], node: str) -> None:
    info = object_info[node]
    assert info["display_name"].startswith("Würstchen ") and info["description"].endswith(".")
    assert all(tooltip.endswith(".") for tooltip in info["output_tooltips"])
    for name, kind, options in _inputs(info):
        assert options["tooltip"].endswith("."), name
        if kind in ("INT", "FLOAT"):
            assert options["min"] <= options["default"] <= options["max"], name


def test_the_shipped_model_is_the_first_choice_and_the_users_files_follow(object_info: dict[str, Any]) -> None:
    kind, options = object_info["WuerstchenBundleLoader"]["input"]["required"]["bundle"]
    choices = kind if isinstance(kind, list) else options["options"]
    assert choices[0] == options["default"] == "Würstchen demo (shipped)"
    assert "tiny.safetensors" in choices


def test_the_template_browser_offers_the_workflows(server: Server) -> None:
    assert sorted(server.get("/api/workflow_templates")[PACK]) == names()
    for name in names():
        assert server.get(f"/api/workflow_templates/{PACK}/{name}.json") == workflow(name)


@pytest.mark.parametrize("name", names())
def test_the_workflows_nodes_lie_apart_and_in_groups(name: str) -> None:
    graph, title_bar = workflow(name), 30  # above a node's position
    places = [(*node["pos"], *node["size"]) for node in graph["nodes"]]
    boxes = [(x, y - title_bar, x + width, y + height) for x, y, width, height in places]
    for a, b in combinations(boxes, 2):
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1], (a, b)
    groups = [(x, y, x + width, y + height) for x, y, width, height in (group["bounding"] for group in graph["groups"])]
    for box in boxes:
        assert any(g[0] < box[0] and g[1] < box[1] and box[2] < g[2] and box[3] < g[3] for g in groups), box


@pytest.mark.parametrize("name", names())
def test_the_workflows_name_each_socket_as_the_nodes_do(object_info: dict[str, Any], name: str) -> None:
    graph = workflow(name)
    for node in graph["nodes"]:
        info = object_info.get(node["type"])
        if info is None:
            assert node["type"] == "MarkdownNote"
            continue
        assert {slot["name"] for slot in node["inputs"]} == {name for name, _, _ in _inputs(info)}
        if info["output_node"]:  # the newer host's SaveImage also hands its pictures on
            continue
        assert [slot["name"] for slot in node["outputs"]] == info["output_name"]
        assert [slot["type"] for slot in node["outputs"]] == info["output"]
    nodes = {node["id"]: node for node in graph["nodes"]}
    for link, start, start_slot, end, end_slot, kind in graph["links"]:
        assert link in nodes[start]["outputs"][start_slot]["links"]
        assert nodes[end]["inputs"][end_slot]["link"] == link
        assert nodes[start]["outputs"][start_slot]["type"] == kind == nodes[end]["inputs"][end_slot]["type"]
