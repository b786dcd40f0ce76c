"""Every workflow that ships, run as it ships: it paints what it says, and the picture beside it is what it paints."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import find
from helpers.layouts import clip_of_transformers, vqgan_of_diffusers
from helpers.networks import DECODER, NETWORKS, PRIOR, Network
from PIL import Image
from safetensors.torch import save_file

from tools.comfyui.client import Outcome, Server
from tools.comfyui.graphs import (
    ALWAYS,
    LORA,
    MUTED,
    RELEASED,
    RELEASED_V1,
    WORKFLOWS,
    api_form,
    halves,
    names,
    workflow,
)
from tools.comfyui.workflow_pictures import in_rows
from tools.demo.judge import Judge
from wuerstchen_core import WuerstchenPipeline
from wuerstchen_core.demo.vocabulary import COLOURS, THINGS, Scene
from wuerstchen_core.models.decoder import Decoder
from wuerstchen_core.models.prior import Prior

Graph = dict[str, Any]
Paint = Callable[[Graph], Outcome]
Load = Callable[[str], Graph]

LARGE = 0
BIGG, CLIP_H = 128, 64  # widths of the small towers
JPEG = 4.0  # of 255: what a picture may lose on average by being saved; another picture is off by 10 and more


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge()


@pytest.fixture
def load(object_info: dict[str, Any]) -> Load:
    """A workflow by its name, ready to run."""
    return lambda name: api_form(workflow(name), object_info)


@pytest.fixture(scope="module")
def lora(models: Path) -> Iterator[None]:
    """The LoRA where its workflow asks the user to put it."""
    copy = models / "loras" / LORA.name
    shutil.copy(LORA, copy)
    yield
    copy.unlink()


@pytest.fixture(scope="module")
def released(models: Path) -> Iterator[None]:
    """Small networks in the layouts of the released files, where the workflow says and under its names."""
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
    files = wanted_files()
    for path, url in files.items():
        part = url.removeprefix("https://huggingface.co/warp-ai/").removesuffix(".safetensors")
        save_file({key: tensor.contiguous() for key, tensor in states.pop(part).items()}, models / path)
    assert not states
    yield
    for path in files:
        (models / path).unlink()


def wanted_files() -> dict[str, str]:
    """Where each file of the released weights belongs, and where it is found."""
    nodes = workflow(RELEASED)["nodes"]
    files = [file for node in nodes for file in node["properties"].get("models", [])]
    return {f"{file['directory']}/{file['name']}": file["url"] for file in files}


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.convert("RGB"))


def shows(judge: Judge, picture: Image.Image) -> tuple[str, str]:
    """The large thing and the background of a picture."""
    array = pixels(picture)
    colour = judge.background(array)
    assert colour >= 0, "no known background"
    thing = judge.identify(array, Scene(0, colour, LARGE)).thing
    return THINGS[thing].name if thing >= 0 else "nothing", list(COLOURS)[colour]


def check_picture(name: str, outcome: Outcome) -> None:
    """The picture beside a workflow is the one that it paints."""
    kept, painted = Image.open(WORKFLOWS / f"{name}.jpg"), in_rows(outcome.pictures)
    assert kept.size == painted.size
    assert np.abs(pixels(kept).astype(float) - pixels(painted)).mean() < JPEG, f"paint {name}.jpg again"


def test_each_workflow_has_a_picture_and_a_test() -> None:
    tested = {
        "batch_of_seeds",
        "img2img_other_model",
        "lora",
        "prompt_weighting_and_negative",
        "text_to_image",  # in test_host_pictures
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
    assert {path.stem for path in WORKFLOWS.glob("*.jpg")} == tested - {RELEASED, RELEASED_V1}


def test_stock_ksamplers_paint_the_prompt(load: Load, paint: Paint, judge: Judge) -> None:
    [picture] = paint(load("text_to_image_ksampler")).pictures
    assert shows(judge, picture) == ("red apple", "blue")


def test_v1_paints_what_the_pipeline_paints(load: Load, paint: Paint, judge: Judge) -> None:
    name = "text_to_image_v1"
    outcome = paint(load(name))
    assert shows(judge, outcome.pictures[0]) == ("red apple", "blue")
    check_picture(name, outcome)
    [expected] = WuerstchenPipeline.load("demo-v1", device="cpu", dtype="fp32").generate(
        "a red apple on a blue background", seed=1
    )
    more = pixels(expected).astype(int) - pixels(outcome.pictures[0])  # ComfyUI cuts off what we round
    assert np.isin(more, (0, 1)).mean() > 0.99  # rounding may tip the choice of a token


def test_weights_choose_the_thing_and_the_negative_the_background(load: Load, paint: Paint, judge: Judge) -> None:
    name = "prompt_weighting_and_negative"
    outcome = paint(load(name))
    thing, background = shows(judge, outcome.pictures[0])
    assert thing == "cat" and background != "gray"
    check_picture(name, outcome)

    reversed_weights, anyhow = load(name), load(name)
    find(reversed_weights, "WuerstchenTextEncode")["text"] = "a (cat:0.7), a (frog:1.3)"
    assert shows(judge, paint(reversed_weights).pictures[0])[0] == "frog"
    negative = next(n["inputs"] for n in anyhow.values() if n["inputs"].get("text") == "a gray background")
    negative["text"] = ""
    assert shows(judge, paint(anyhow).pictures[0])[1] == "gray"


def test_the_lora_changes_the_background_as_far_as_its_strength(
    load: Load, paint: Paint, judge: Judge, lora: None
) -> None:
    graph = load("lora")
    outcome = paint(graph)
    assert shows(judge, outcome.pictures[0]) == ("red apple", "pink")
    check_picture("lora", outcome)
    find(graph, "WuerstchenLoraLoader")["strength_model"] = 0.0
    assert shows(judge, paint(graph).pictures[0]) == ("red apple", "blue")


def test_each_half_follows_its_own_prompt(load: Load, paint: Paint, judge: Judge) -> None:
    name = "two_prompts_by_mask"
    outcome = paint(load(name))
    [picture] = outcome.pictures
    assert picture.size == (512, 256)
    assert [shows(judge, half) for half in halves(picture)] == [("red apple", "yellow"), ("cat", "blue")]
    check_picture(name, outcome)


def test_the_workflow_with_another_model_runs_without_it(
    server: Server, object_info: dict[str, Any], load: Load, paint: Paint, judge: Judge
) -> None:
    name = "img2img_other_model"
    graph = load(name)
    outcome = paint(graph)
    assert shows(judge, outcome.pictures[0]) == ("red apple", "blue")
    check_picture(name, outcome)
    whole = workflow(name)
    muted = [node for node in whole["nodes"] if node["mode"] == MUTED]
    for node in muted:
        node["mode"] = ALWAYS
    unmuted = api_form(whole, object_info)
    assert len(unmuted) == len(graph) + len(muted)
    # All that the second half lacks is a checkpoint to choose; the first runs again all the same.
    answer = json.loads(server.post("/prompt", {"prompt": unmuted}))
    errors = [error for node in answer["node_errors"].values() for error in node["errors"]]
    assert [error["extra_info"]["input_name"] for error in errors] == ["ckpt_name"]


@pytest.mark.newest
def test_a_batch_paints_different_pictures_of_one_thing(load: Load, paint: Paint, judge: Judge) -> None:
    outcome = paint(load("batch_of_seeds"))
    shown = [shows(judge, picture) for picture in outcome.pictures]
    assert len(shown) == 8 and {thing for thing, _ in shown} == {"cat"}
    assert len({background for _, background in shown}) > 1
    assert len({picture.tobytes() for picture in outcome.pictures}) == 8
    check_picture("batch_of_seeds", outcome)


def test_the_released_weights_are_found_by_name_and_paint(load: Load, paint: Paint, released: None) -> None:
    graph = load(RELEASED)
    assert find(graph, "WuerstchenPriorSample")["schedule"] == "original"
    assert find(graph, "WuerstchenPriorSample")["cfg"] == 4.0 and find(graph, "WuerstchenDecoderSample")["steps"] == 12
    find(graph, "WuerstchenEmptyLatents").update(width=256, height=192)
    find(graph, "WuerstchenDecoderSample")["steps"] = 2
    [picture] = paint(graph).pictures
    assert picture.size == (256, 192)


def test_the_released_weights_are_offered_under_the_names_that_the_loaders_ask_for() -> None:
    for node in workflow(RELEASED)["nodes"]:
        if node["type"].endswith("Loader"):
            [file] = node["properties"]["models"]
            assert file["name"] == node["widgets_values"][0]
    note = next(node["widgets_values"][0] for node in workflow(RELEASED)["nodes"] if node["type"] == "MarkdownNote")
    for path, url in wanted_files().items():
        folder, _, file = path.partition("/")
        assert f"({url})" in note and f"{folder}/ **{file}**" in note
