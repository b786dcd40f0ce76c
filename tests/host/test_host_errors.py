"""Wrong sockets and wrong files: one sentence that says what to do, and the host goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bundles import FOREIGN, HALF, V1, find
from safetensors.torch import save_file

from tools.comfyui.client import Outcome, Server

Graph = dict[str, Any]


def _key(graph: Graph, kind: str) -> str:
    return next(key for key, node in graph.items() if node["class_type"] == kind)


def _sockets(kind: str, **slots: tuple[str, int] | Any) -> Callable[[Graph], None]:
    """Connect inputs of the node `kind`: name=(kind of the other node, output), or name=value."""

    def change(graph: Graph) -> None:
        for name, slot in slots.items():
            find(graph, kind)[name] = [_key(graph, slot[0]), slot[1]] if isinstance(slot, tuple) else slot

    return change


def _foreign_latent(graph: Graph) -> None:
    graph["sd"] = {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}}
    find(graph, "WuerstchenPriorSample")["stage_c"] = ["sd", 0]


def _other_times(graph: Graph) -> None:
    source = {"model": [_key(graph, LOADER), 0], "sampling": "eps", "zsnr": False}
    graph["other"] = {"class_type": "ModelSamplingDiscrete", "inputs": source}
    find(graph, PRIOR)["model"] = ["other", 0]


def _more_pictures_than_latents(graph: Graph) -> None:
    size = {"width": 128, "height": 128}
    graph["other"] = {"class_type": "WuerstchenEmptyLatents", "inputs": {**size, "batch_size": 3}}
    find(graph, "WuerstchenEmptyLatents").update(**size, batch_size=2)
    find(graph, "WuerstchenDecoderSample")["stage_b"] = ["other", 1]


def _stock_decode(graph: Graph) -> None:
    node = graph[_key(graph, "WuerstchenVAEDecode")]
    latents = [_key(graph, "WuerstchenPriorSample"), 0]
    inputs = {"samples": latents, "vae": [_key(graph, "WuerstchenBundleLoader"), 5]}
    node.update(class_type="VAEDecode", inputs=inputs)


LOADER, TEXT, EMPTY = "WuerstchenBundleLoader", "WuerstchenTextEncode", "WuerstchenEmptyLatents"
PRIOR, COND, DECODER = "WuerstchenPriorSample", "WuerstchenDecoderConditioning", "WuerstchenDecoderSample"
DECODE = "WuerstchenVAEDecode"
CASCADE = "cascade_stage_c.safetensors"

# What is done wrong, and words of the answer.
MISTAKES: dict[str, tuple[Callable[[Graph], None], tuple[str, ...]]] = {
    "decoder as prior": (_sockets(PRIOR, model=(LOADER, 1)), ("Prior Sample", "a decoder", "connect the prior output")),
    "prior as decoder": (_sockets(DECODER, model=(LOADER, 0)), ("Decoder Sample", "a prior", "connect the decoder")),
    "stage b to prior": (_sockets(PRIOR, stage_c=(EMPTY, 1)), ("needs Stage C", "given Stage B", "stage_c output")),
    "stage c to decoder": (_sockets(DECODER, stage_b=(EMPTY, 0)), ("needs Stage B", "given Stage C", "stage_b output")),
    "stage c to decode": (_sockets(DECODE, stage_b=(PRIOR, 0)), ("VAE Decode", "needs Stage B", "stage_b output")),
    "stage b to conditioning": (_sockets(COND, stage_c=(EMPTY, 1)), ("Conditioning", "needs Stage C")),
    "another family's times": (_other_times, ("times are not Würstchen's", "connect the prior or decoder output")),
    "another family's latents": (_foreign_latent, ("needs Stage C", "[1, 4, 8, 8]", "Empty Latents")),
    "decoder's text to prior": (_sockets(PRIOR, positive=(TEXT, 1)), ("Stage C reads", "32 wide", "is 24 wide")),
    "prior's text to decoder": (_sockets(COND, conditioning=(TEXT, 0)), ("Stage B reads", "24 wide", "is 32 wide")),
    "conditioning of stage b to prior": (_sockets(DECODER, positive=(TEXT, 1)), ("connect Würstchen Decoder Cond",)),
    "guidance without negative": (_sockets(DECODER, cfg=2.0), ("needs a negative", "cfg to 1")),
    "batches that differ": (_more_pictures_than_latents, ("3 empty latents for 2 pictures", "same batch size")),
    "encoder as stage a": (_sockets(DECODE, vae=(LOADER, 5)), ("not Stage A", "vae output")),
    "encoder in stock decode": (_stock_decode, ("only encodes", "Stage A")),
    "one part only": (_sockets(LOADER, bundle=HALF), ("no prior", "vqgan")),
    "first version": (_sockets(LOADER, bundle=V1), ("Würstchen v1", "Token Decoder Loader")),
    "another model's file": (_sockets(LOADER, bundle=FOREIGN), (FOREIGN, "it holds a Stable Diffusion model")),
    "stable cascade's file": (
        _sockets(LOADER, bundle=CASCADE),
        (CASCADE, "it holds a Stable Cascade model, whose latents are not Würstchen's"),
    ),
}


@pytest.fixture(scope="module", autouse=True)
def cascade(checkpoints: Path) -> None:
    """Stage C of Stable Cascade among the checkpoints, as ComfyUI's all-in-one file has it."""
    names = ("clip_txt_mapper.weight", "clip_txt_pooled_mapper.weight", "clip_img_mapper.weight")
    save_file({f"model.diffusion_model.{name}": torch.zeros(2, 2) for name in names}, checkpoints / CASCADE)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_answered_by_one_sentence(server: Server, graph: Graph, mistake: str) -> None:
    change, words = MISTAKES[mistake]
    change(graph)
    outcome = server.run(graph)
    assert outcome.status == "execution_error", outcome.error
    assert "\n" not in outcome.error and len(outcome.error) < 300
    assert all(word in outcome.error for word in words), outcome.error


def test_the_prior_refuses_the_decoders_conditioning(server: Server, graph: Graph) -> None:
    empty = _key(graph, EMPTY)
    graph["loop"] = {"class_type": COND, "inputs": {"conditioning": [_key(graph, TEXT), 0], "stage_c": [empty, 0]}}
    find(graph, PRIOR)["positive"] = ["loop", 0]
    assert "connect the prior output" in server.run(graph).error


def test_a_file_that_went_away_is_named(server: Server, graph: Graph) -> None:
    find(graph, LOADER)["bundle"] = "gone.safetensors"
    outcome = server.run(graph)
    # The newer host refuses it before the run, the older one leaves it to the node.
    assert outcome.status in ("invalid", "execution_error") and "gone.safetensors" in outcome.error


def test_after_all_mistakes_the_next_prompt_runs(
    server: Server, graph: Graph, paint: Callable[[Graph], Outcome]
) -> None:
    assert server.run({**graph, _key(graph, LOADER): {"class_type": LOADER, "inputs": {"bundle": HALF}}}).error
    assert len(paint(graph).pictures) == 1
