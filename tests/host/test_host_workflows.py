"""Every shipped workflow generates what its prompt says, and the image next to it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import Generate, Graph, find, skip_if_too_old
from helpers.layouts import clip_of_transformers, vqgan_of_diffusers
from helpers.networks import DECODER, NETWORKS, PRIOR, Network
from images import check_image, content, pixels
from PIL import Image
from safetensors.torch import save_file

from tools.comfyui.client import Server
from tools.comfyui.graphs import (
    ALWAYS,
    MUTED,
    RELEASED,
    RELEASED_V1,
    api_form,
    halves,
    names,
    picture_file,
    workflow,
)
from tools.demo.judge import Judge
from wuerstchen_core import WuerstchenPipeline
from wuerstchen_core.models.decoder import Decoder
from wuerstchen_core.models.prior import Prior

Load = Callable[[str], Graph]

BIGG, CLIP_H = 128, 64  # widths of the small text encoders


@pytest.fixture(scope="module")
def released(models: Path) -> Iterator[None]:
    """Writes small networks in the released layouts to the folders and names of the workflow."""
    prior = Network(lambda: Prior(replace(PRIOR, c_cond=BIGG)), NETWORKS["prior"].inputs, ())
    decoder = Network(lambda: Decoder(replace(DECODER, clip_embd=CLIP_H)), NETWORKS["decoder"].inputs, ())
    states = {
        "wuerstchen-prior/resolve/main/prior/diffusion_pytorch_model": prior.perturbed().state_dict(),
        "wuerstchen-prior/resolve/main/text_encoder/model": clip_of_transformers(BIGG, 2),
        "wuerstchen/resolve/main/decoder/diffusion_pytorch_model": decoder.perturbed().state_dict(),
        "wuerstchen/resolve/main/text_encoder/model": clip_of_transformers(CLIP_H, 2),
        "wuerstchen/resolve/main/vqgan/diffusion_pytorch_model": vqgan_of_diffusers(
            NETWORKS["vqgan"].perturbed().state_dict()
        ),
    }
    files = released_files()
    for path, url in files.items():
        part = url.removeprefix("https://huggingface.co/warp-ai/").removesuffix(".safetensors")
        save_file({key: tensor.contiguous() for key, tensor in states.pop(part).items()}, models / path)
    assert not states
    yield
    for path in files:
        (models / path).unlink()


def released_files() -> dict[str, str]:
    """Returns the URL of each released file by its path in the models folder."""
    nodes = workflow(RELEASED)["nodes"]
    files = [file for node in nodes for file in node["properties"].get("models", [])]
    return {f"{file['directory']}/{file['name']}": file["url"] for file in files}


def test_each_workflow_has_an_image_and_a_test() -> None:
    tested = {
        "batch_of_seeds",
        "img2img_other_model",
        "lora",
        "prompt_weighting_and_negative",
        "text_to_image",  # in test_host_pictures
        "train_lora",
        "text_to_image_ksampler",
        "text_to_image_v1",
        "two_prompts_by_mask",
        RELEASED,
        RELEASED_V1,  # in test_host_tokens
        # in test_host_edits
        "image_to_image",
        "image_variation",
        "inpaint",
        "interpolate_pictures",
        "interpolate_prompts",
        "outpaint",
        "reconstruct",
        "style_mix",
    }
    assert set(names()) == tested
    assert {name for name in names() if picture_file(name).is_file()} == tested - {RELEASED, RELEASED_V1}


def test_ksampler_shows_the_prompt(load: Load, generate: Generate, judge: Judge) -> None:
    [picture] = generate(load("text_to_image_ksampler")).pictures
    assert content(judge, picture) == ("red apple", "blue")


def test_v1_gives_the_pipelines_image(load: Load, generate: Generate, judge: Judge) -> None:
    name = "text_to_image_v1"
    outcome = generate(load(name))
    assert content(judge, outcome.pictures[0]) == ("red apple", "blue")
    check_image(name, outcome)
    [expected] = WuerstchenPipeline.load("demo-v1", device="cpu", dtype="fp32").generate(
        "a red apple on a blue background", seed=1
    )
    difference = pixels(expected).astype(int) - pixels(outcome.pictures[0])  # ComfyUI truncates, the core rounds
    assert np.isin(difference, (0, 1)).mean() > 0.99  # rounding may change a token


def test_weights_set_the_thing_and_the_negative_the_background(load: Load, generate: Generate, judge: Judge) -> None:
    name = "prompt_weighting_and_negative"
    outcome = generate(load(name))
    thing, background = content(judge, outcome.pictures[0])
    assert thing == "cat" and background != "gray"
    check_image(name, outcome)

    reversed_weights, without_negative = load(name), load(name)
    find(reversed_weights, "WuerstchenTextEncode")["text"] = "a (cat:0.7), a (frog:1.3)"
    assert content(judge, generate(reversed_weights).pictures[0])[0] == "frog"
    negative = next(n["inputs"] for n in without_negative.values() if n["inputs"].get("text") == "a gray background")
    negative["text"] = ""
    assert content(judge, generate(without_negative).pictures[0])[1] == "gray"


def test_the_lora_changes_the_background_unless_its_strength_is_0(load: Load, generate: Generate, judge: Judge) -> None:
    graph = load("lora")
    outcome = generate(graph)
    assert content(judge, outcome.pictures[0]) == ("red apple", "pink")
    check_image("lora", outcome)
    find(graph, "WuerstchenLoraLoader")["strength_model"] = 0.0
    assert content(judge, generate(graph).pictures[0]) == ("red apple", "blue")


def test_a_trained_lora_teaches_the_backgrounds_of_its_pictures(
    server: Server, object_info: dict[str, Any], load: Load, generate: Generate, judge: Judge, models: Path
) -> None:
    skip_if_too_old("train_lora", object_info)
    graph = load("train_lora")
    find(graph, "TrainLoraNode")["steps"] = 60
    [picture] = [picture for picture in generate(graph).pictures if picture.size == (512, 256)]
    shipped = Image.open(picture_file("train_lora"))
    for image in (picture, shipped):
        assert [content(judge, half) for half in halves(image)] == [("dog", "gray"), ("dog", "green")]

    [file] = (server.folder / "output" / "loras").glob("wuerstchen_trained_60_steps_*.safetensors")
    file.rename(models / "loras" / file.name)
    graph = load("lora")
    find(graph, "WuerstchenTextEncode")["text"], find(graph, "PrimitiveInt")["value"] = "a dog", 5
    for strength, background in ((1.0, "green"), (0.0, "gray")):
        find(graph, "WuerstchenLoraLoader").update(lora_name=file.name, strength_model=strength)
        assert content(judge, generate(graph).pictures[0]) == ("dog", background)


def test_each_half_follows_its_own_prompt(load: Load, generate: Generate, judge: Judge) -> None:
    name = "two_prompts_by_mask"
    outcome = generate(load(name))
    [picture] = outcome.pictures
    assert picture.size == (512, 256)
    assert [content(judge, half) for half in halves(picture)] == [("red apple", "yellow"), ("cat", "blue")]
    check_image(name, outcome)


def test_the_workflow_with_another_model_runs_with_that_model_muted(
    server: Server, object_info: dict[str, Any], load: Load, generate: Generate, judge: Judge
) -> None:
    name = "img2img_other_model"
    graph = load(name)
    outcome = generate(graph)
    assert content(judge, outcome.pictures[0]) == ("red apple", "blue")
    check_image(name, outcome)
    whole = workflow(name)
    muted = [node for node in whole["nodes"] if node["mode"] == MUTED]
    for node in muted:
        node["mode"] = ALWAYS
    unmuted = api_form(whole, object_info)
    assert len(unmuted) == len(graph) + len(muted)
    # The unmuted half lacks only a checkpoint to choose; the other half still runs.
    response = json.loads(server.post("/prompt", {"prompt": unmuted}))
    errors = [error for node in response["node_errors"].values() for error in node["errors"]]
    assert [error["extra_info"]["input_name"] for error in errors] == ["ckpt_name"]


@pytest.mark.newest
def test_a_batch_gives_different_images_of_one_thing(load: Load, generate: Generate, judge: Judge) -> None:
    outcome = generate(load("batch_of_seeds"))
    shown = [content(judge, picture) for picture in outcome.pictures]
    assert len(shown) == 4 and {thing for thing, _ in shown} == {"frog"}
    assert len({background for _, background in shown}) == 3
    assert len({picture.tobytes() for picture in outcome.pictures}) == 4
    check_image("batch_of_seeds", outcome)


def test_the_released_workflow_runs(load: Load, generate: Generate, released: None) -> None:
    graph = load(RELEASED)
    assert find(graph, "WuerstchenPriorSample")["schedule"] == "original"
    assert find(graph, "WuerstchenPriorSample")["cfg"] == 4.0 and find(graph, "WuerstchenDecoderSample")["steps"] == 12
    find(graph, "WuerstchenEmptyLatents").update(width=256, height=192)
    find(graph, "WuerstchenDecoderSample")["steps"] = 2
    [picture] = generate(graph).pictures
    assert picture.size == (256, 192)


def test_the_released_workflow_names_and_links_its_files() -> None:
    for node in workflow(RELEASED)["nodes"]:
        if node["type"].endswith("Loader"):
            [file] = node["properties"]["models"]
            assert file["name"] == node["widgets_values"][0]
    note = next(node["widgets_values"][0] for node in workflow(RELEASED)["nodes"] if node["type"] == "MarkdownNote")
    for path, url in released_files().items():
        folder, _, file = path.partition("/")
        assert f"({url})" in note and f"{folder}/ **{file}**" in note
