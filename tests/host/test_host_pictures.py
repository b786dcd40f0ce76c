"""Pictures painted inside ComfyUI, over HTTP: they show what the prompt says, and equal those of the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from bundles import TINY, find
from PIL import Image

from tools.comfyui.client import REPOSITORY, RUN_SECONDS, Outcome, Server
from tools.demo.judge import Judge
from wuerstchen_core import WuerstchenPipeline
from wuerstchen_core.demo.vocabulary import Scene, caption

RED_APPLE, SMALL_CAT = Scene(0, 4, 0), Scene(23, 2, 1)
EGGPLANT = Scene(11, 2, 0)  # held out of training

Paint = Callable[[dict[str, Any]], Outcome]

LIMIT = 0.01  # of 255, on average and beyond rounding; less than 0.00005 observed


def deviation(host: Image.Image, core: Image.Image) -> float:
    """Mean deviation of ComfyUI's picture from ours, of 255, beyond rounding: ComfyUI cuts decimals off, we round."""
    theirs, ours = (np.asarray(picture.convert("RGB"), dtype=np.float32) for picture in (host, core))
    assert theirs.shape == ours.shape
    more = ours - theirs  # 0 or 1 where the colours are equal
    return float(np.maximum(np.maximum(more - 1, -more), 0).mean())


def difference(a: Image.Image, b: Image.Image) -> float:
    """Mean absolute difference of two pictures, of 255."""
    pair = [np.asarray(picture.convert("RGB"), dtype=np.float32) for picture in (a, b)]
    assert pair[0].shape == pair[1].shape
    return float(np.abs(pair[0] - pair[1]).mean())


@cache
def command_line(prompt: str, seed: int, model: str = "demo") -> Image.Image:
    """The picture that `python -m wuerstchen_core generate` paints; the same for every ComfyUI."""
    with TemporaryDirectory() as folder:
        output = Path(folder) / "picture.png"
        command = [sys.executable, "-m", "wuerstchen_core", "generate", prompt, "--seed", str(seed)]
        fixed = ["--model", model, "--device", "cpu", "--dtype", "fp32", "--output", str(output)]
        subprocess.run([*command, *fixed], cwd=REPOSITORY, check=True, capture_output=True, timeout=RUN_SECONDS)
        return Image.open(output).copy()


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge()


@pytest.mark.parametrize("scene", [RED_APPLE, SMALL_CAT, EGGPLANT], ids=caption)
def test_the_workflow_paints_its_prompt(shipped: dict[str, Any], paint: Paint, judge: Judge, scene: Scene) -> None:
    find(shipped, "WuerstchenTextEncode")["text"] = caption(scene)
    seed = find(shipped, "PrimitiveInt")["value"]
    outcome = paint(shipped)
    [picture] = outcome.pictures
    pixels = np.asarray(picture.convert("RGB"))
    assert judge.identify(pixels, scene) == scene
    assert "is unknown" not in outcome.log
    # The command line is given nothing but the prompt and the seed: one truth, one set of defaults.
    assert deviation(picture, command_line(caption(scene), seed)) <= LIMIT


def test_the_hosts_own_sampling_nodes_paint_with_our_schedule_and_sampler(
    shipped: dict[str, Any], paint: Paint, judge: Judge
) -> None:
    """SamplerCustom in place of both of our sampling nodes; its noise is the host's, so the picture is another one."""
    for kind, latent, cfg, steps in (
        ("WuerstchenPriorSample", "stage_c", 3.0, 20),
        ("WuerstchenDecoderSample", "stage_b", 1.0, 12),
    ):
        [key] = [key for key, node in shipped.items() if node["class_type"] == kind]
        given = shipped[key]["inputs"]
        model, positive = given["model"], given["positive"]
        shipped[f"{key} sigmas"] = {
            "class_type": "WuerstchenScheduler",
            "inputs": {"model": model, "schedule": "linear", "steps": steps},
        }
        shipped[f"{key} sampler"] = {"class_type": "WuerstchenSampler", "inputs": {}}
        inputs = {"model": model, "positive": positive, "negative": given.get("negative", positive), "cfg": cfg}
        inputs |= {"add_noise": True, "noise_seed": 5, "latent_image": given[latent]}
        inputs |= {"sampler": [f"{key} sampler", 0], "sigmas": [f"{key} sigmas", 0]}
        shipped[key] = {"class_type": "SamplerCustom", "inputs": inputs}
    [picture] = paint(shipped).pictures
    pixels = np.asarray(picture.convert("RGB"))
    assert judge.identify(pixels, RED_APPLE) == RED_APPLE


def test_the_workflow_starts_with_a_prompt_of_the_models_words(shipped: dict[str, Any]) -> None:
    assert find(shipped, "WuerstchenTextEncode")["text"] == caption(RED_APPLE)


def test_the_seed_means_the_same_here_and_on_the_command_line(
    graph: dict[str, Any], paint: Paint, checkpoints: Path
) -> None:
    find(graph, "WuerstchenTextEncode")["text"] = "a red apple"
    find(graph, "PrimitiveInt")["value"] = 3
    [picture] = paint(graph).pictures
    assert deviation(picture, command_line("a red apple", 3, str(checkpoints / TINY))) <= LIMIT
    [other] = WuerstchenPipeline.load(checkpoints / TINY, device="cpu", dtype="fp32").generate("a red apple", seed=4)
    assert deviation(picture, other) > 5


def test_the_fast_schedule_means_the_same(graph: dict[str, Any], paint: Paint, checkpoints: Path) -> None:
    find(graph, "WuerstchenTextEncode")["text"] = "a red apple"
    find(graph, "WuerstchenPriorSample")["schedule"], find(graph, "WuerstchenDecoderSample")["steps"] = "fast", 4
    find(graph, "PrimitiveInt")["value"] = 3
    [picture] = paint(graph).pictures
    pipeline = WuerstchenPipeline.load(checkpoints / TINY, device="cpu", dtype="fp32")
    fast, other = (pipeline.generate("a red apple", seed=3, schedule=name)[0] for name in ("fast", None))
    assert deviation(picture, fast) <= LIMIT < deviation(picture, other)


def test_a_negative_prompt_and_guidance_mean_the_same(graph: dict[str, Any], paint: Paint, checkpoints: Path) -> None:
    negative = next(
        node for node in graph.values() if node["class_type"] == "WuerstchenTextEncode" and not node["inputs"]["text"]
    )
    negative["inputs"]["text"] = "a blue car"
    link = [next(key for key, node in graph.items() if node is negative), 1]
    find(graph, "WuerstchenDecoderSample").update(cfg=2.0, negative=link)
    find(graph, "WuerstchenPriorSample").update(cfg=2.5, schedule="diffusers")
    find(graph, "WuerstchenTextEncode")["text"] = "a red apple"
    [picture] = paint(graph).pictures
    pipeline = WuerstchenPipeline.load(checkpoints / TINY, device="cpu", dtype="fp32")
    wanted = {"schedule": "diffusers", "prior_guidance": 2.5, "decoder_guidance": 2.0, "seed": 1}
    [same] = pipeline.generate("a red apple", negative="a blue car", **wanted)
    [other] = pipeline.generate("a red apple", **wanted)
    assert deviation(picture, same) <= LIMIT
    assert deviation(picture, other) > 1


def test_a_batch_equals_its_singles(graph: dict[str, Any], paint: Paint) -> None:
    find(graph, "WuerstchenEmptyLatents").update(width=128, height=128, batch_size=2)
    batch = paint(graph).pictures
    find(graph, "WuerstchenEmptyLatents")["batch_size"] = 1
    for i, picture in enumerate(batch):
        find(graph, "PrimitiveInt")["value"] = 1 + i
        [single] = paint(graph).pictures
        assert difference(picture, single) < 0.1
    assert difference(*batch) > 1


def test_progress_is_reported_for_both_stages(graph: dict[str, Any], paint: Paint) -> None:
    find(graph, "PrimitiveInt")["value"] = 77
    progress = paint(graph).progress
    by_kind = {graph[node]["class_type"]: steps for node, steps in progress.items()}
    # One host thins out messages that follow each other fast.
    assert by_kind["WuerstchenPriorSample"][-1] == 4 and by_kind["WuerstchenDecoderSample"][-1] == 3


def test_any_size_is_made_legal_and_said(graph: dict[str, Any], paint: Paint) -> None:
    find(graph, "WuerstchenEmptyLatents").update(width=300, height=72)
    outcome = paint(graph)
    assert outcome.pictures[0].size == (320, 64)
    assert outcome.log.count("cannot paint 300x72 pixels, but 320x64") == 1


def test_an_unknown_word_is_named_even_behind_another_node(graph: dict[str, Any], paint: Paint) -> None:
    encode = find(graph, "WuerstchenTextEncode")
    graph["clone"] = {
        "class_type": "CLIPSetLastLayer",
        "inputs": {"clip": encode["prior_clip"], "stop_at_clip_layer": -1},
    }
    encode.update(text="a red dragon", prior_clip=["clone", 0])
    lines = [line for line in paint(graph).log.splitlines() if "dragon" in line]
    assert len(lines) == 1 and "unknown" in lines[0]


def test_the_image_encoder_is_a_vae_that_encodes_any_size(
    server: Server, graph: dict[str, Any], paint: Paint, checkpoints: Path
) -> None:
    source = np.random.default_rng(0).integers(0, 256, (192, 256, 3), dtype=np.uint8)
    (server.folder / "input").mkdir(exist_ok=True)
    Image.fromarray(source).save(server.folder / "input" / "source.png")
    loader = next(key for key, node in graph.items() if node["class_type"] == "WuerstchenBundleLoader")
    graph["load"] = {"class_type": "LoadImage", "inputs": {"image": "source.png"}}
    graph["encode"] = {"class_type": "VAEEncode", "inputs": {"pixels": ["load", 0], "vae": [loader, 5]}}
    find(graph, "WuerstchenDecoderConditioning")["stage_c"] = ["encode", 0]
    find(graph, "WuerstchenTextEncode")["text"] = ""
    [picture] = paint(graph).pictures
    pipeline = WuerstchenPipeline.load(checkpoints / TINY, device="cpu", dtype="fp32")
    [same] = pipeline.reconstruct(server.folder / "input" / "source.png", seed=1)
    assert deviation(picture, same) <= LIMIT


def test_cancel_works_within_a_step_and_leaves_the_host_alive(
    server: Server, graph: dict[str, Any], paint: Paint
) -> None:
    find(graph, "WuerstchenPriorSample")["steps"] = 1000
    stopped: list[int] = []

    def interrupt(node: str, step: int) -> None:
        if not stopped:
            stopped.append(step)
            server.post("/interrupt")

    outcome = server.run(graph, interrupt)
    assert outcome.status == "execution_interrupted"
    [steps] = outcome.progress.values()
    assert stopped[0] <= steps[-1] < 500
    find(graph, "WuerstchenPriorSample")["steps"] = 4
    assert len(paint(graph).pictures) == 1


def test_the_saved_picture_holds_the_graph(graph: dict[str, Any], paint: Paint) -> None:
    find(graph, "PrimitiveInt")["value"] = 99
    [picture] = paint(graph).pictures
    saved = json.loads(picture.info["prompt"])
    assert {key: {name: node[name] for name in ("class_type", "inputs")} for key, node in saved.items()} == graph
