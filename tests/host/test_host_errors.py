"""Wrong sockets and files: one line that says what to do, and ComfyUI keeps running."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bundles import FOREIGN, HALF, V1, Generate, Graph, find
from errors import check_error
from safetensors.torch import save_file

from tools.comfyui.client import Server


def _key(graph: Graph, kind: str) -> str:
    return next(key for key, node in graph.items() if node["class_type"] == kind)


def _sockets(kind: str, **slots: tuple[str, int] | Any) -> Callable[[Graph], None]:
    """Returns a change that connects inputs of the node `kind`: name=(kind of the other node, output) or a value."""

    def change(graph: Graph) -> None:
        for name, slot in slots.items():
            find(graph, kind)[name] = [_key(graph, slot[0]), slot[1]] if isinstance(slot, tuple) else slot

    return change


def _foreign_latent(graph: Graph) -> None:
    graph["sd"] = {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}}
    find(graph, "WuerstchenPriorSample")["stage_c"] = ["sd", 0]


def _other_schedule(graph: Graph) -> None:
    source = {"model": [_key(graph, LOADER), 0], "sampling": "eps", "zsnr": False}
    graph["other"] = {"class_type": "ModelSamplingDiscrete", "inputs": source}
    find(graph, PRIOR)["model"] = ["other", 0]


def _other_batch_size(graph: Graph) -> None:
    size = {"width": 128, "height": 128}
    graph["other"] = {"class_type": "WuerstchenEmptyLatents", "inputs": {**size, "batch_size": 3}}
    find(graph, "WuerstchenEmptyLatents").update(**size, batch_size=2)
    find(graph, "WuerstchenDecoderSample")["stage_b"] = ["other", 1]


def _stock_decode(graph: Graph) -> None:
    node = graph[_key(graph, "WuerstchenVAEDecode")]
    latents = [_key(graph, "WuerstchenPriorSample"), 0]
    inputs = {"samples": latents, "vae": [_key(graph, "WuerstchenBundleLoader"), 5]}
    node.update(class_type="VAEDecode", inputs=inputs)


def _linked(kind: str, name: str, value: float) -> Callable[[Graph], None]:
    """Returns a change that connects a number to an input of the node `kind`, past the limits of its widget."""

    def change(graph: Graph) -> None:
        primitive = "PrimitiveInt" if isinstance(value, int) else "PrimitiveFloat"
        graph["number"] = {"class_type": primitive, "inputs": {"value": value}}
        find(graph, kind)[name] = ["number", 0]

    return change


LOADER, TEXT, EMPTY = "WuerstchenBundleLoader", "WuerstchenTextEncode", "WuerstchenEmptyLatents"
PRIOR, COND, DECODER = "WuerstchenPriorSample", "WuerstchenDecoderConditioning", "WuerstchenDecoderSample"
DECODE = "WuerstchenVAEDecode"
CASCADE = "cascade_stage_c.safetensors"

# What is wrong, and what the error must name.
MISTAKES: dict[str, tuple[Callable[[Graph], None], tuple[str, ...]]] = {
    "decoder as prior": (_sockets(PRIOR, model=(LOADER, 1)), ("Prior Sample", "decoder (Stage B)", "prior output")),
    "prior as decoder": (_sockets(DECODER, model=(LOADER, 0)), ("Decoder Sample", "prior (Stage C)", "decoder output")),
    "stage b to prior": (_sockets(PRIOR, stage_c=(EMPTY, 1)), ("Prior Sample", "Stage C", "Stage B", "stage_c")),
    "stage c to decoder": (_sockets(DECODER, stage_b=(EMPTY, 0)), ("Decoder Sample", "Stage B", "Stage C", "stage_b")),
    "stage c to decode": (_sockets(DECODE, stage_b=(PRIOR, 0)), ("VAE Decode", "Stage B", "stage_b")),
    "stage b to conditioning": (_sockets(COND, stage_c=(EMPTY, 1)), ("Decoder Conditioning", "Stage C")),
    "another noise schedule": (_other_schedule, ("ModelSampling", "prior or decoder output")),
    "another model's latents": (_foreign_latent, ("Stage C", "[1, 4, 8, 8]", "Empty Latents")),
    "decoder's text to prior": (_sockets(PRIOR, positive=(TEXT, 1)), ("Stage C", "32", "24 wide")),
    "prior's text to decoder": (_sockets(COND, conditioning=(TEXT, 0)), ("Stage B", "24", "32 wide")),
    "no stage c": (_sockets(DECODER, positive=(TEXT, 1)), ("Würstchen Decoder Conditioning",)),
    "guidance without negative": (_sockets(DECODER, cfg=2.0), ("negative", "cfg")),
    "batches that differ": (_other_batch_size, ("3 empty latents", "2 Stage C latents", "batch size")),
    "encoder as stage a": (_sockets(DECODE, vae=(LOADER, 5)), ("Stage A", "vae output")),
    "encoder in stock decode": (_stock_decode, ("image encoder", "Stage A")),
    "one part only": (_sockets(LOADER, bundle=HALF), ("prior", "vqgan")),
    "v1": (_sockets(LOADER, bundle=V1), (V1, "v1", "Token Decoder Loader")),
    "another model's file": (_sockets(LOADER, bundle=FOREIGN), (FOREIGN, "Stable Diffusion")),
    "no images": (_linked(EMPTY, "batch_size", 0), ("Empty Latents", "batch_size", "0", "from 1 to 4096")),
    "less than no images": (_linked(EMPTY, "batch_size", -1), ("Empty Latents", "batch_size", "-1")),
    "no width": (_linked(EMPTY, "width", 0), ("Empty Latents", "width", "from 16 to 16384")),
    "guidance that is no number": (_linked(PRIOR, "cfg", float("nan")), ("Prior Sample", "cfg", "nan", "from 1 to 30")),
    "too much guidance": (_linked(DECODER, "cfg", 1000.0), ("Decoder Sample", "cfg", "1000.0", "from 1 to 30")),
    "guidance below 1": (_linked(PRIOR, "cfg", 0.5), ("Prior Sample", "cfg", "0.5", "from 1 to 30")),
    "negative seed": (_linked(PRIOR, "seed", -1), ("Prior Sample", "seed", "-1")),
    "too strong": (_linked(DECODER, "denoise", 1.5), ("Decoder Sample", "denoise", "1.5", "from 0 to 1")),
    "no steps": (_linked(DECODER, "steps", 0), ("Decoder Sample", "steps", "from 1 to 1000")),
    "stable cascade's file": (_sockets(LOADER, bundle=CASCADE), (CASCADE, "Stable Cascade")),
}


@pytest.fixture(scope="module", autouse=True)
def cascade(checkpoints: Path) -> None:
    """Puts Stage C of Stable Cascade among the checkpoints, in the format of ComfyUI's all-in-one file."""
    names = ("clip_txt_mapper.weight", "clip_txt_pooled_mapper.weight", "clip_img_mapper.weight")
    save_file({f"model.diffusion_model.{name}": torch.zeros(2, 2) for name in names}, checkpoints / CASCADE)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_explained_in_one_line(server: Server, graph: Graph, mistake: str) -> None:
    change, facts = MISTAKES[mistake]
    change(graph)
    outcome = server.run(graph)
    assert outcome.status == "execution_error", outcome.error
    check_error(outcome.error, *facts)


def test_the_prior_rejects_the_decoders_conditioning(server: Server, graph: Graph) -> None:
    empty = _key(graph, EMPTY)
    graph["loop"] = {"class_type": COND, "inputs": {"conditioning": [_key(graph, TEXT), 0], "stage_c": [empty, 0]}}
    find(graph, PRIOR)["positive"] = ["loop", 0]
    check_error(server.run(graph).error, "Stage C", "prior output")


def test_a_missing_file_is_named(server: Server, graph: Graph) -> None:
    find(graph, LOADER)["bundle"] = "gone.safetensors"
    outcome = server.run(graph)
    # Newer ComfyUI versions reject it before the run, older ones leave it to the node.
    assert outcome.status in ("invalid", "execution_error") and "gone.safetensors" in outcome.error


def test_after_all_mistakes_the_next_prompt_runs(server: Server, graph: Graph, generate: Generate) -> None:
    assert server.run({**graph, _key(graph, LOADER): {"class_type": LOADER, "inputs": {"bundle": HALF}}}).error
    assert len(generate(graph).pictures) == 1
