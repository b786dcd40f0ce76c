"""Images generated over HTTP: they show their prompt and equal those of the command line and the pipeline."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from bundles import TINY, Generate, Graph, find
from images import LIMIT, deviation, difference, pixels
from PIL import Image

from tools.comfyui.client import REPOSITORY, RUN_SECONDS, Server
from tools.demo.judge import Judge
from wuerstchen_core import WuerstchenPipeline
from wuerstchen_core.demo.vocabulary import Scene, caption

RED_APPLE, SMALL_CAT = Scene(0, 4, 0), Scene(23, 2, 1)
EGGPLANT = Scene(11, 2, 0)  # held out of training


@cache
def command_line(prompt: str, seed: int, model: str = "demo") -> Image.Image:
    """Returns the image of `python -m wuerstchen_core generate`, computed once for all ComfyUIs."""
    with TemporaryDirectory() as folder:
        output = Path(folder) / "picture.png"
        command = [sys.executable, "-m", "wuerstchen_core", "generate", prompt, "--seed", str(seed)]
        fixed = ["--model", model, "--device", "cpu", "--dtype", "fp32", "--output", str(output)]
        subprocess.run([*command, *fixed], cwd=REPOSITORY, check=True, capture_output=True, timeout=RUN_SECONDS)
        return Image.open(output).copy()


@pytest.mark.parametrize("scene", [RED_APPLE, SMALL_CAT, EGGPLANT], ids=caption)
def test_the_workflow_shows_its_prompt(shipped: Graph, generate: Generate, judge: Judge, scene: Scene) -> None:
    find(shipped, "WuerstchenTextEncode")["text"] = caption(scene)
    seed = find(shipped, "PrimitiveInt")["value"]
    outcome = generate(shipped)
    [picture] = outcome.pictures
    assert judge.identify(pixels(picture), scene) == scene
    assert "is unknown" not in outcome.log
    # The command line gets only the prompt and the seed: the defaults are the same.
    assert deviation(picture, command_line(caption(scene), seed)) <= LIMIT


def test_samplercustom_works_with_our_schedule_and_sampler(shipped: Graph, generate: Generate, judge: Judge) -> None:
    """SamplerCustom replaces both sampling nodes. It uses ComfyUI's noise, so the image is a different one."""
    for kind, latent, cfg, steps in (
        ("WuerstchenPriorSample", "stage_c", 3.0, 20),
        ("WuerstchenDecoderSample", "stage_b", 1.0, 12),
    ):
        [key] = [key for key, node in shipped.items() if node["class_type"] == kind]
        old = shipped[key]["inputs"]
        model, positive = old["model"], old["positive"]
        shipped[f"{key} sigmas"] = {
            "class_type": "WuerstchenScheduler",
            "inputs": {"model": model, "schedule": "linear", "steps": steps},
        }
        shipped[f"{key} sampler"] = {"class_type": "WuerstchenSampler", "inputs": {}}
        inputs = {"model": model, "positive": positive, "negative": old.get("negative", positive), "cfg": cfg}
        inputs |= {"add_noise": True, "noise_seed": 5, "latent_image": old[latent]}
        inputs |= {"sampler": [f"{key} sampler", 0], "sigmas": [f"{key} sigmas", 0]}
        shipped[key] = {"class_type": "SamplerCustom", "inputs": inputs}
    [picture] = generate(shipped).pictures
    assert judge.identify(pixels(picture), RED_APPLE) == RED_APPLE


def test_the_workflows_prompt_uses_the_models_words(shipped: Graph) -> None:
    assert find(shipped, "WuerstchenTextEncode")["text"] == caption(RED_APPLE)


def test_a_seed_gives_the_image_of_the_command_line(graph: Graph, generate: Generate, checkpoints: Path) -> None:
    find(graph, "WuerstchenTextEncode")["text"] = "a red apple"
    find(graph, "PrimitiveInt")["value"] = 3
    [picture] = generate(graph).pictures
    assert deviation(picture, command_line("a red apple", 3, str(checkpoints / TINY))) <= LIMIT
    [other] = WuerstchenPipeline.load(checkpoints / TINY, device="cpu", dtype="fp32").generate("a red apple", seed=4)
    assert deviation(picture, other) > 5


@pytest.mark.parametrize(("schedule", "steps", "decoder_steps"), [("fast", 6, 4), ("turbo", 2, 1)])
def test_a_schedule_gives_the_pipelines_image(
    schedule: str, steps: int, decoder_steps: int, graph: Graph, generate: Generate, checkpoints: Path
) -> None:
    find(graph, "WuerstchenTextEncode")["text"] = "a red apple"
    find(graph, "WuerstchenPriorSample").update(schedule=schedule, steps=steps)
    find(graph, "WuerstchenDecoderSample")["steps"] = decoder_steps
    find(graph, "PrimitiveInt")["value"] = 3
    [picture] = generate(graph).pictures
    pipeline = WuerstchenPipeline.load(checkpoints / TINY, device="cpu", dtype="fp32")
    settings = {"schedule": schedule, "prior_steps": steps, "decoder_steps": decoder_steps}
    same, other = (pipeline.generate("a red apple", seed=3, **x)[0] for x in (settings, {}))
    assert deviation(picture, same) <= LIMIT < deviation(picture, other)


def test_a_negative_prompt_and_guidance_give_the_pipelines_image(
    graph: Graph, generate: Generate, checkpoints: Path
) -> None:
    negative = next(
        node for node in graph.values() if node["class_type"] == "WuerstchenTextEncode" and not node["inputs"]["text"]
    )
    negative["inputs"]["text"] = "a blue car"
    link = [next(key for key, node in graph.items() if node is negative), 1]
    find(graph, "WuerstchenDecoderSample").update(cfg=2.0, negative=link)
    find(graph, "WuerstchenPriorSample").update(cfg=2.5, schedule="diffusers")
    find(graph, "WuerstchenTextEncode")["text"] = "a red apple"
    [picture] = generate(graph).pictures
    pipeline = WuerstchenPipeline.load(checkpoints / TINY, device="cpu", dtype="fp32")
    settings = {"schedule": "diffusers", "prior_guidance": 2.5, "decoder_guidance": 2.0, "seed": 1}
    [same] = pipeline.generate("a red apple", negative="a blue car", **settings)
    [other] = pipeline.generate("a red apple", **settings)
    assert deviation(picture, same) <= LIMIT
    assert deviation(picture, other) > 1


def test_a_batch_equals_its_singles(graph: Graph, generate: Generate) -> None:
    find(graph, "WuerstchenEmptyLatents").update(width=128, height=128, batch_size=2)
    batch = generate(graph).pictures
    find(graph, "WuerstchenEmptyLatents")["batch_size"] = 1
    for i, picture in enumerate(batch):
        find(graph, "PrimitiveInt")["value"] = 1 + i
        [single] = generate(graph).pictures
        assert difference(picture, single) < 0.1
    assert difference(*batch) > 1


def test_progress_is_reported_for_both_stages(graph: Graph, generate: Generate) -> None:
    find(graph, "PrimitiveInt")["value"] = 77
    progress = generate(graph).progress
    by_kind = {graph[node]["class_type"]: steps for node, steps in progress.items()}
    # Newer ComfyUI versions drop messages that follow each other fast.
    assert by_kind["WuerstchenPriorSample"][-1] == 4 and by_kind["WuerstchenDecoderSample"][-1] == 3


def test_an_illegal_size_is_rounded_with_a_warning(graph: Graph, generate: Generate) -> None:
    find(graph, "WuerstchenEmptyLatents").update(width=300, height=72)
    outcome = generate(graph)
    assert outcome.pictures[0].size == (320, 64)
    [line] = [line for line in outcome.log.splitlines() if "300x72" in line]
    assert "320x64" in line
    [text] = [outcome.texts[key] for key, node in graph.items() if node["class_type"] == "WuerstchenEmptyLatents"]
    assert "320x64" in text and line.endswith(text.removeprefix("⚠ "))


def test_a_size_that_the_model_was_not_trained_for_is_named_at_each_run(graph: Graph, generate: Generate) -> None:
    """On *Würstchen Prior Sample* and KSampler, also in a subgraph, and not for sizes near the default."""
    size, sample = find(graph, "WuerstchenEmptyLatents"), find(graph, "WuerstchenPriorSample")
    key = next(key for key, node in graph.items() if node["class_type"] == "WuerstchenPriorSample")
    size.update(width=512, height=512)
    for seed in (1, 2):
        sample["seed"] = seed
        texts = generate(graph).texts
        assert list(texts) == [key] and "512x512" in texts[key] and "222x222" in texts[key]
    inputs = {"latent_image": sample["stage_c"], "sampler_name": "ddpm", "scheduler": "simple", "denoise": 1.0}
    kept = {name: sample[name] for name in ("model", "positive", "negative", "seed", "cfg")}
    inner = {"class_type": "KSampler", "inputs": {**kept, **inputs, "steps": 2}}
    outer = {name: node for name, node in graph.items() if name != key}
    for node in outer.values():
        for name, value in node["inputs"].items():
            if value == [key, 0]:
                node["inputs"][name] = ["90:91", 0]
    texts = generate({**outer, "90:91": inner}).texts
    assert texts["90:91"] == texts["90"] and "512x512" in texts["90"]
    size.update(width=256, height=192)
    assert not generate({**outer, "90:91": inner}).texts


def test_an_unknown_word_is_named_behind_another_node_too(graph: Graph, generate: Generate) -> None:
    encode = find(graph, "WuerstchenTextEncode")
    graph["clone"] = {
        "class_type": "CLIPSetLastLayer",
        "inputs": {"clip": encode["prior_clip"], "stop_at_clip_layer": -1},
    }
    stock = {"clip": encode["prior_clip"], "text": "a red griffin"}
    graph["stock"] = {"class_type": "CLIPTextEncode", "inputs": stock}
    find(graph, "WuerstchenPriorSample")["positive"] = ["stock", 0]
    encode.update(text="a red dragon", prior_clip=["clone", 0])
    log = generate(graph).log.splitlines()
    for word in ("dragon", "griffin"):
        lines = [line for line in log if word in line]
        assert len(lines) == 1 and "unknown" in lines[0]


def test_the_image_encoder_works_in_vae_encode(
    server: Server, graph: Graph, generate: Generate, checkpoints: Path
) -> None:
    source = np.random.default_rng(0).integers(0, 256, (192, 256, 3), dtype=np.uint8)
    (server.folder / "input").mkdir(exist_ok=True)
    Image.fromarray(source).save(server.folder / "input" / "source.png")
    loader = next(key for key, node in graph.items() if node["class_type"] == "WuerstchenBundleLoader")
    graph["load"] = {"class_type": "LoadImage", "inputs": {"image": "source.png"}}
    graph["encode"] = {"class_type": "VAEEncode", "inputs": {"pixels": ["load", 0], "vae": [loader, 5]}}
    find(graph, "WuerstchenDecoderConditioning")["stage_c"] = ["encode", 0]
    find(graph, "WuerstchenTextEncode")["text"] = ""
    [picture] = generate(graph).pictures
    pipeline = WuerstchenPipeline.load(checkpoints / TINY, device="cpu", dtype="fp32")
    [same] = pipeline.reconstruct(server.folder / "input" / "source.png", seed=1)
    assert deviation(picture, same) <= LIMIT


def test_cancelling_stops_within_a_step_and_the_next_prompt_runs(
    server: Server, graph: Graph, generate: Generate
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
    assert len(generate(graph).pictures) == 1


def test_the_saved_image_holds_the_prompt(graph: Graph, generate: Generate) -> None:
    find(graph, "PrimitiveInt")["value"] = 99
    [picture] = generate(graph).pictures
    saved = json.loads(picture.info["prompt"])
    assert {key: {name: node[name] for name in ("class_type", "inputs")} for key, node in saved.items()} == graph
