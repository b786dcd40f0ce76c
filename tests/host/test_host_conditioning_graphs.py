"""Text and conditioning in whole prompts: their images, and errors in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import TINY, Generate, Graph, find
from errors import check_error
from images import LIMIT, deviation

from tools.comfyui.client import Server
from tools.comfyui.graphs import halves
from tools.demo.judge import Judge
from wuerstchen_core import WuerstchenPipeline
from wuerstchen_core.demo.vocabulary import Scene, caption


def stock_sampler(graph: Graph, kind: str, latent: str, **changed: Any) -> None:
    """Replaces one of our sampling nodes with ComfyUI's KSampler."""
    node = next(node for node in graph.values() if node["class_type"] == kind)
    old = node["inputs"]
    inputs = {"model": old["model"], "positive": old["positive"], "latent_image": old[latent], "seed": 1}
    inputs |= {"negative": old.get("negative", old["positive"]), "denoise": 1.0, "sampler_name": "ddpm"}
    node.update(class_type="KSampler", inputs={**inputs, "cfg": 2.0, "steps": 2, "scheduler": "simple", **changed})


def text_node(graph: Graph) -> str:
    return next(key for key, node in graph.items() if node["class_type"] == "WuerstchenTextEncode")


@pytest.mark.parametrize(
    ("kind", "latent", "output", "facts"),
    [
        ("WuerstchenPriorSample", "stage_c", 1, ("Stage C", "32", "24 wide")),
        ("WuerstchenDecoderSample", "stage_b", 0, ("Stage B", "24", "32 wide")),
        ("WuerstchenDecoderSample", "stage_b", 1, ("Würstchen Decoder Conditioning",)),
    ],
)
def test_ksampler_with_a_wrong_conditioning_fails_with_one_line(
    server: Server, graph: Graph, kind: str, latent: str, output: int, facts: tuple[str, ...]
) -> None:
    stock_sampler(graph, kind, latent, positive=[text_node(graph), output])
    outcome = server.run(graph)
    assert outcome.status == "execution_error"
    check_error(outcome.error, *facts)


@pytest.mark.parametrize("text", ["", ("a red apple on a blue background, " * 300)[:10_000]], ids=["empty", "10,000"])
def test_a_text_of_any_length_gives_the_pipelines_image(
    graph: Graph, generate: Generate, checkpoints: Path, text: str
) -> None:
    find(graph, "WuerstchenTextEncode")["text"] = text
    find(graph, "WuerstchenEmptyLatents").update(width=128, height=128)
    find(graph, "PrimitiveInt")["value"] = 5
    [picture] = generate(graph).pictures
    pipeline = WuerstchenPipeline.load(checkpoints / TINY, device="cpu", dtype="fp32")
    [same] = pipeline.generate(text, seed=5, width=128, height=128)
    assert deviation(picture, same) <= LIMIT
    [cut] = pipeline.generate("a red apple on a blue background", seed=5, width=128, height=128)
    assert deviation(picture, cut) > 0.5


HALVES = (Scene(0, 2, 0), Scene(23, 4, 0))  # a red apple on yellow, a cat on blue


def test_two_prompts_combined_by_mask_fill_a_half_each(shipped: Graph, generate: Generate, judge: Judge) -> None:
    text, size = text_node(shipped), {"width": 512, "height": 256}
    find(shipped, "WuerstchenEmptyLatents").update(size)
    clips = {name: shipped[text]["inputs"][name] for name in ("prior_clip", "decoder_clip")}

    def add(name: str, kind: str, **inputs: Any) -> list[Any]:
        shipped[name] = {"class_type": kind, "inputs": inputs}
        return [name, 0]

    black, white = (
        add("black", "SolidMask", value=0.0, **size),
        add("white", "SolidMask", value=1.0, width=256, height=256),
    )
    masked: dict[str, list[Any]] = {"prior": [], "decoder": []}
    for i, scene in enumerate(HALVES):
        add(f"text {i}", "WuerstchenTextEncode", text=caption(scene), **clips)
        mask = add(f"mask {i}", "MaskComposite", destination=black, source=white, x=256 * i, y=0, operation="add")
        for output, stage in enumerate(masked):
            inputs_of_mask = {
                "conditioning": [f"text {i}", output],
                "mask": mask,
                "strength": 1.0,
                "set_cond_area": "mask bounds",
            }
            masked[stage].append(add(f"{stage} {i}", "ConditioningSetMask", **inputs_of_mask))
    for stage, (left, right) in masked.items():
        add(stage, "ConditioningCombine", conditioning_1=left, conditioning_2=right)
    find(shipped, "WuerstchenPriorSample")["positive"] = ["prior", 0]
    find(shipped, "WuerstchenDecoderConditioning")["conditioning"] = ["decoder", 0]
    [picture] = generate(shipped).pictures
    for scene, half in zip(HALVES, halves(picture), strict=True):
        assert judge.identify(np.asarray(half), scene) == scene
