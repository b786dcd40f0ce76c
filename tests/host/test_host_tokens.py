"""Würstchen v1 in ComfyUI: its prior and its token decoder paint what the core paints, from every kind of file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bundles import SAMPLING_V1, V1, find
from helpers.layouts import clip_of_transformers, encoder_state, original
from helpers.networks import NETWORKS, PRIOR, TOKEN_DECODER
from inside_tokens import BATCH, MISTAKES, RENOISED, RUNS
from safetensors.torch import save_file
from test_host_pictures import LIMIT, deviation

from tools.comfyui.client import Inside, Install, Outcome, Server, run_inside
from tools.comfyui.graphs import RELEASED_V1, api_form, workflow
from wuerstchen_core import WuerstchenPipeline
from wuerstchen_core.models.image_encoder import EFFICIENTNET_V2_L, ImageEncoderParams
from wuerstchen_core.models.prior import Prior
from wuerstchen_core.models.token_decoder import TokenDecoder

Graph = dict[str, Any]
Paint = Callable[[Graph], Outcome]

CLIP_H = 64  # width of the small tower
PROMPT, SEED = "a red apple", 3


@pytest.fixture(scope="module")
def inside(install: Install, checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> Inside:
    """What inside_tokens.py computed in this ComfyUI."""
    return run_inside(install, "inside_tokens.py", tmp_path_factory.mktemp("tokens"), checkpoints / V1)


@pytest.mark.parametrize("run", [*RUNS, "the second alone", "masked", "ignored", "as it is", "evicted"])
def test_the_same_seed_gives_the_cores_tokens(inside: Inside, run: str) -> None:
    tensors, _ = inside
    assert torch.equal(tensors[f"got/{run}"], tensors[f"want/{run}"])


def test_every_way_of_choosing_paints_something_else(inside: Inside) -> None:
    painted = [inside[0][f"got/{run}"] for run in (*RUNS, "masked")]
    for i, one in enumerate(painted):
        assert all(not torch.equal(one, other) for other in painted[:i])
        assert not torch.equal(one[0], one[1])


def test_what_a_mask_keeps_is_the_picture_in_the_codes_of_stage_a(inside: Inside) -> None:
    tensors, _ = inside
    kept = tensors["kept"]
    torch.testing.assert_close(tensors["got/masked"][..., : kept.shape[-1]], kept, rtol=0, atol=1e-6)


def test_the_start_from_a_picture_replaces_the_share_of_its_tokens_that_was_asked_for(inside: Inside) -> None:
    started, picture = inside[0]["started"].split(BATCH)
    share = (started != picture).float().mean()
    assert abs(share - RENOISED) < 0.04  # of 1024 tokens; standard deviation 0.015


def test_the_priors_features_have_no_other_units(inside: Inside) -> None:
    tensors, _ = inside
    torch.testing.assert_close(tensors["got/prior"], tensors["want/prior"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(tensors["got/prior in the host"], tensors["want/prior in the host"])
    assert tensors["version"].all()


def test_progress_counts_the_steps_and_shows_them(inside: Inside) -> None:
    assert inside[1]["watched"]["complete"] == [[1, 3, [32, 16]], [2, 3, [32, 16]], [3, 3, [32, 16]]]


def test_a_run_can_be_cancelled_after_each_step(inside: Inside) -> None:
    watched = inside[1]["watched"]
    assert watched["cancelled"] and watched["until"] == 1 and watched["after"]


def test_the_token_decoder_makes_room_for_stage_a_and_the_reverse(inside: Inside) -> None:
    assert inside[1]["loaded in turn"] == [["TokenModel"], ["VQGAN"]] * 2


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_answered_by_one_sentence(inside: Inside, mistake: str) -> None:
    answer = inside[1]["mistakes"].get(mistake, "no error")
    assert all(word in answer for word in MISTAKES[mistake]), answer
    assert "\n" not in answer and len(answer) < 300


@pytest.fixture(scope="module")
def released(models: Path) -> Iterator[dict[str, Path]]:
    """Small networks in the layouts of v1's released files, where the workflow has them, by part."""
    prior = replace(NETWORKS["prior"], build=lambda: Prior(replace(PRIOR, c_cond=CLIP_H))).perturbed()
    params = replace(TOKEN_DECODER, byt5_embd=CLIP_H)
    decoder = replace(NETWORKS["token_decoder"], build=lambda: TokenDecoder(params)).perturbed()
    vqgan = NETWORKS["vqgan"].perturbed()
    torch.nn.init.constant_(vqgan.out_block[0].bias, 0.5)  # pictures that are grey, not clipped to black
    folder = models / "diffusion_models"
    files = {
        "prior": folder / "model_stage_c_ema.pt",
        "token_decoder": folder / "model_stage_b.pt",
        "vqgan": models / "vae" / "vqgan_f4_v1_500k.pt",
        "prior_text_encoder": models / "text_encoders" / "wuerstchen_v2_clip_h.safetensors",
    }
    encoder = encoder_state(ImageEncoderParams(EFFICIENTNET_V2_L))
    torch.save({"ema_state_dict": original(prior.state_dict())}, files["prior"])
    torch.save({"state_dict": decoder.state_dict(), "effnet_state_dict": encoder}, files["token_decoder"])
    torch.save({"state_dict": vqgan.state_dict()}, files["vqgan"])
    torch.manual_seed(0)
    tower = clip_of_transformers(CLIP_H, 2)
    save_file({key: x.contiguous() for key, x in tower.items()}, files["prior_text_encoder"])
    yield files | {"decoder_text_encoder": files["prior_text_encoder"]}
    for file in files.values():
        file.unlink()


@pytest.fixture
def v1_graph(object_info: dict[str, Any]) -> Graph:
    """The workflow for v1's released files, of a small picture in few steps."""
    graph = api_form(workflow(RELEASED_V1), object_info)
    find(graph, "WuerstchenEmptyLatents").update(width=128, height=64)
    find(graph, "WuerstchenPriorSample")["steps"] = SAMPLING_V1["prior_steps"]
    find(graph, "WuerstchenTokenDecoderSample")["steps"] = SAMPLING_V1["decoder_steps"]
    find(graph, "WuerstchenTextEncode")["text"] = PROMPT
    find(graph, "PrimitiveInt")["value"] = SEED
    return graph


def same(outcome: Outcome, pipeline: WuerstchenPipeline, guidance: float) -> None:
    """The picture is the one that the pipeline paints."""
    sizes = {"width": 128, "height": 64, "prior_steps": 4, "decoder_steps": 3}
    [picture], [wanted] = outcome.pictures, pipeline.generate(PROMPT, seed=SEED, prior_guidance=guidance, **sizes)
    assert deviation(picture, wanted) <= LIMIT
    assert np.asarray(picture).std() > 5


def test_the_released_files_paint_what_the_pipeline_paints_of_them(
    server: Server, v1_graph: Graph, paint: Paint, object_info: dict[str, Any], released: dict[str, Path]
) -> None:
    published = api_form(workflow(RELEASED_V1), object_info)
    given = {"schedule": "linear", "steps": 60, "cfg": 6.0}
    assert given.items() <= find(published, "WuerstchenPriorSample").items()
    given = {"steps": 8, "cfg": 2.0, "cfg_end": 0.0, "temperature": 1.0, "temperature_end": 0.6, "mode": "multinomial"}
    assert given.items() <= find(published, "WuerstchenTokenDecoderSample").items()
    assert find(published, "WuerstchenEmptyLatents") == {"width": 512, "height": 512, "batch_size": 1}
    pipeline = WuerstchenPipeline.load(released, device="cpu", dtype="fp32", version="v1")
    outcome = paint(v1_graph)
    same(outcome, pipeline, 6.0)
    [node] = [key for key, node in v1_graph.items() if node["class_type"] == "WuerstchenTokenDecoderSample"]
    assert outcome.progress[node][-1] == SAMPLING_V1["decoder_steps"]

    find(v1_graph, "WuerstchenModelLoader")["version"] = "v2"  # whose features are 42 times as large
    assert "Stage C latents of v2" in server.run(v1_graph).error


def offered(server: Server, node: str, name: str) -> list[str]:
    kind, options = server.get(f"/object_info/{node}")[node]["input"]["required"][name]
    return kind if isinstance(kind, list) else options["options"]


def test_the_parts_of_a_v1_bundle_are_offered_by_name_and_paint(
    server: Server, v1_graph: Graph, paint: Paint, checkpoints: Path
) -> None:
    """Each loader offers what the bundle in models/checkpoints has for it, behind the files of its own folder."""
    chosen = [
        ("WuerstchenModelLoader", "model_name", "prior"),
        ("WuerstchenTokenDecoderLoader", "model_name", "token decoder"),
        ("WuerstchenCLIPLoader", "clip_name", "text tower"),
        ("WuerstchenVAELoader", "vae_name", "Stage A"),
    ]
    dead, cut = checkpoints / "dead.safetensors", checkpoints / "cut.safetensors"  # which hinder nothing
    dead.symlink_to(checkpoints / "gone.safetensors")
    cut.write_bytes((checkpoints / V1).read_bytes()[:1000])
    for node, name, part in chosen:
        assert f"{part} of {V1}" in offered(server, node, name)
        find(v1_graph, node)[name] = f"{part} of {V1}"
    assert f"image encoder of {V1}" in offered(server, "WuerstchenVAELoader", "vae_name")
    dead.unlink()
    cut.unlink()
    find(v1_graph, "WuerstchenPriorSample")["cfg"] = SAMPLING_V1["prior_guidance"]
    pipeline = WuerstchenPipeline.load(checkpoints / V1, device="cpu", dtype="fp32")
    same(paint(v1_graph), pipeline, SAMPLING_V1["prior_guidance"])
