"""Würstchen v1 in ComfyUI: its prior and token decoder equal the core's, from every kind of file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bundles import SAMPLING_V1, V1, Generate, Graph, find
from conditioning_walk import DIFFERENT, NOTICE, RAW, REFUSED, SILENT
from errors import check_error
from helpers.layouts import clip_of_transformers, encoder_state, original
from helpers.networks import NETWORKS, PRIOR, TOKEN_DECODER
from images import LIMIT, deviation
from inside_tokens import BATCH, MISTAKES, RENOISED, RUNS
from safetensors.torch import save_file

from tools.comfyui.client import Inside, Install, Outcome, Server, run_inside
from tools.comfyui.graphs import RELEASED_V1, api_form, workflow
from wuerstchen_core import WuerstchenPipeline
from wuerstchen_core.models.image_encoder import EFFICIENTNET_V2_L, ImageEncoderParams
from wuerstchen_core.models.prior import Prior
from wuerstchen_core.models.token_decoder import TokenDecoder

CLIP_H = 64  # width of the small text encoder
PROMPT, SEED = "a red apple", 3


@pytest.fixture(scope="module")
def inside(install: Install, checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> Inside:
    """The results of inside_tokens.py in this ComfyUI."""
    return run_inside(install, "inside_tokens.py", tmp_path_factory.mktemp("tokens"), checkpoints / V1)


@pytest.mark.parametrize("run", [*RUNS, "the second alone", "masked", "soft mask", "ignored", "as it is", "evicted"])
def test_the_same_seed_gives_the_cores_tokens(inside: Inside, run: str) -> None:
    tensors, _ = inside
    assert torch.equal(tensors[f"got/{run}"], tensors[f"want/{run}"])


def test_every_setting_changes_the_result(inside: Inside) -> None:
    results = [inside[0][f"got/{run}"] for run in (*RUNS, "masked", "soft mask")]
    for i, one in enumerate(results):
        assert all(not torch.equal(one, other) for other in results[:i])
        assert not torch.equal(one[0], one[1])


def test_the_unmasked_area_is_the_quantised_image(inside: Inside) -> None:
    tensors, _ = inside
    kept = tensors["kept"]
    torch.testing.assert_close(tensors["got/masked"][..., : kept.shape[-1]], kept, rtol=0, atol=1e-6)


def test_denoise_is_the_fraction_of_random_tokens_at_the_start(inside: Inside) -> None:
    start, image = inside[0]["start"].split(BATCH)
    fraction = (start != image).float().mean()
    assert abs(fraction - RENOISED) < 0.04  # of 1024 tokens; standard deviation 0.015


def test_the_v1_prior_works_in_the_features_units(inside: Inside) -> None:
    tensors, _ = inside
    torch.testing.assert_close(tensors["got/prior"], tensors["want/prior"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(tensors["got/prior in KSampler"], tensors["want/prior in KSampler"])
    assert tensors["version"].all()


def test_progress_has_each_step_and_its_preview(inside: Inside) -> None:
    assert inside[1]["progress"]["complete"] == [[1, 3, [32, 16]], [2, 3, [32, 16]], [3, 3, [32, 16]]]


def test_a_run_can_be_cancelled_after_each_step(inside: Inside) -> None:
    progress = inside[1]["progress"]
    assert progress["cancelled"] and progress["until"] == 1 and progress["after"]


def test_token_decoder_and_stage_a_evict_each_other(inside: Inside) -> None:
    assert inside[1]["loaded in turn"] == [["TokenModel"], ["VQGAN"]] * 2


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_explained_in_one_line(inside: Inside, mistake: str) -> None:
    check_error(inside[1]["mistakes"].get(mistake, ""), *MISTAKES[mistake])


@pytest.fixture(scope="module")
def released(models: Path) -> Iterator[dict[str, Path]]:
    """Writes small networks in v1's released layouts to the workflow's folders; returns the files by part."""
    prior = replace(NETWORKS["prior"], build=lambda: Prior(replace(PRIOR, c_cond=CLIP_H))).perturbed()
    params = replace(TOKEN_DECODER, byt5_embd=CLIP_H)
    decoder = replace(NETWORKS["token_decoder"], build=lambda: TokenDecoder(params)).perturbed()
    vqgan = NETWORKS["vqgan"].perturbed()
    torch.nn.init.constant_(vqgan.out_block[0].bias, 0.5)  # grey images, not clipped to black
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
    clip = clip_of_transformers(CLIP_H, 2)
    save_file({key: x.contiguous() for key, x in clip.items()}, files["prior_text_encoder"])
    yield files | {"decoder_text_encoder": files["prior_text_encoder"]}
    for file in files.values():
        file.unlink()


@pytest.fixture
def v1_graph(object_info: dict[str, Any]) -> Graph:
    """The workflow of v1's released files, for a small image in few steps."""
    graph = api_form(workflow(RELEASED_V1), object_info)
    find(graph, "WuerstchenEmptyLatents").update(width=128, height=64)
    find(graph, "WuerstchenPriorSample")["steps"] = SAMPLING_V1["prior_steps"]
    find(graph, "WuerstchenTokenDecoderSample")["steps"] = SAMPLING_V1["decoder_steps"]
    find(graph, "WuerstchenTextEncode")["text"] = PROMPT
    find(graph, "PrimitiveInt")["value"] = SEED
    return graph


def check_same(outcome: Outcome, pipeline: WuerstchenPipeline, guidance: float) -> None:
    """Asserts that an image equals the pipeline's."""
    sizes = {"width": 128, "height": 64, "prior_steps": 4, "decoder_steps": 3}
    [picture], [expected] = outcome.pictures, pipeline.generate(PROMPT, seed=SEED, prior_guidance=guidance, **sizes)
    assert deviation(picture, expected) <= LIMIT
    assert np.asarray(picture).std() > 5


def test_the_released_files_give_the_pipelines_image(
    server: Server, v1_graph: Graph, generate: Generate, object_info: dict[str, Any], released: dict[str, Path]
) -> None:
    published = api_form(workflow(RELEASED_V1), object_info)
    defaults = {"schedule": "linear", "steps": 60, "cfg": 6.0}
    assert defaults.items() <= find(published, "WuerstchenPriorSample").items()
    defaults = {
        "steps": 8,
        "cfg": 2.0,
        "cfg_end": 0.0,
        "temperature": 1.0,
        "temperature_end": 0.6,
        "mode": "multinomial",
    }
    assert defaults.items() <= find(published, "WuerstchenTokenDecoderSample").items()
    assert find(published, "WuerstchenEmptyLatents") == {"width": 512, "height": 512, "batch_size": 1}
    pipeline = WuerstchenPipeline.load(released, device="cpu", dtype="fp32", version="v1")
    outcome = generate(v1_graph)
    check_same(outcome, pipeline, 6.0)
    [node] = [key for key, node in v1_graph.items() if node["class_type"] == "WuerstchenTokenDecoderSample"]
    assert outcome.progress[node][-1] == SAMPLING_V1["decoder_steps"]

    find(v1_graph, "WuerstchenModelLoader")["version"] = "v2"  # in v2 features are 42 times as large
    check_error(server.run(v1_graph).error, "v1", "v2")


def choices_of(server: Server, node: str, name: str) -> list[str]:
    kind, options = server.get(f"/object_info/{node}")[node]["input"]["required"][name]
    return kind if isinstance(kind, list) else options["options"]


def test_loaders_offer_the_parts_of_a_v1_bundle(
    server: Server, v1_graph: Graph, generate: Generate, checkpoints: Path
) -> None:
    """The parts of a bundle in models/checkpoints follow the files of the loader's own folder."""
    chosen = [
        ("WuerstchenModelLoader", "model_name", "prior"),
        ("WuerstchenTokenDecoderLoader", "model_name", "token decoder"),
        ("WuerstchenCLIPLoader", "clip_name", "text tower"),
        ("WuerstchenVAELoader", "vae_name", "Stage A"),
    ]
    dead, cut = checkpoints / "dead.safetensors", checkpoints / "cut.safetensors"  # both are ignored
    dead.symlink_to(checkpoints / "gone.safetensors")
    cut.write_bytes((checkpoints / V1).read_bytes()[:1000])
    for node, name, part in chosen:
        assert f"{part} of {V1}" in choices_of(server, node, name)
        find(v1_graph, node)[name] = f"{part} of {V1}"
    assert f"image encoder of {V1}" in choices_of(server, "WuerstchenVAELoader", "vae_name")
    dead.unlink()
    cut.unlink()
    find(v1_graph, "WuerstchenPriorSample")["cfg"] = SAMPLING_V1["prior_guidance"]
    pipeline = WuerstchenPipeline.load(checkpoints / V1, device="cpu", dtype="fp32")
    check_same(generate(v1_graph), pipeline, SAMPLING_V1["prior_guidance"])


def test_no_conditioning_node_is_ignored_silently(inside: Inside) -> None:
    """Of ComfyUI's own nodes, each changes the result, is refused or noted, or fails itself on what is not its own."""
    outcomes = inside[1]["nodes"]
    for kind, sentence in outcomes.values():
        if kind in (NOTICE, REFUSED):
            check_error(sentence)
    same_alone = {"ConditioningSetAreaStrength"}  # strengths of one conditioning, the only one here
    assert {name for name, (kind, _) in outcomes.items() if kind in (SILENT, RAW)} == same_alone
    assert outcomes["ControlNetApply"][0] == outcomes["ConditioningSetArea"][0] == REFUSED
    assert outcomes["FluxGuidance"][0] == NOTICE and outcomes["ConditioningConcat"][0] == DIFFERENT
