"""Text and conditionings in whole graphs: the pictures that come of them, and mistakes in one sentence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import TINY, find
from test_host_pictures import LIMIT, deviation

from tools.comfyui.client import Outcome, Server
from tools.comfyui.graphs import halves
from tools.demo.judge import Judge
from wuerstchen_core import WuerstchenPipeline
from wuerstchen_core.demo.vocabulary import Scene, caption

Graph = dict[str, Any]


def stock_sampler(graph: Graph, kind: str, latent: str, **changed: Any) -> None:
    """Put ComfyUI's own KSampler in the place of one of our sampling nodes."""
    node = next(node for node in graph.values() if node["class_type"] == kind)
    given = node["inputs"]
    inputs = {"model": given["model"], "positive": given["positive"], "latent_image": given[latent], "seed": 1}
    inputs |= {"negative": given.get("negative", given["positive"]), "denoise": 1.0, "sampler_name": "ddpm"}
    node.update(class_type="KSampler", inputs={**inputs, "cfg": 2.0, "steps": 2, "scheduler": "simple", **changed})


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge()


def text_node(graph: Graph) -> str:
    return next(key for key, node in graph.items() if node["class_type"] == "WuerstchenTextEncode")


@pytest.mark.parametrize(
    ("kind", "latent", "output", "words"),
    [
        ("WuerstchenPriorSample", "stage_c", 1, "Stage C reads text states 32 wide"),
        ("WuerstchenDecoderSample", "stage_b", 0, "Stage B reads text states 24 wide"),
        ("WuerstchenDecoderSample", "stage_b", 1, "connect Würstchen Decoder Conditioning"),
    ],
)
def test_the_stock_sampler_answers_a_wrong_conditioning_by_one_sentence(
    server: Server, graph: Graph, kind: str, latent: str, output: int, words: str
) -> None:
    stock_sampler(graph, kind, latent, positive=[text_node(graph), output])
    outcome = server.run(graph)
    assert outcome.status == "execution_error"
    assert words in outcome.error and "\n" not in outcome.error and len(outcome.error) < 300


@pytest.mark.parametrize("text", ["", ("a red apple on a blue background, " * 300)[:10_000]], ids=["empty", "10,000"])
def test_a_text_of_any_length_paints_what_the_pipeline_paints(
    graph: Graph, paint: Callable[[Graph], Outcome], checkpoints: Path, text: str
) -> None:
    find(graph, "WuerstchenTextEncode")["text"] = text
    find(graph, "WuerstchenEmptyLatents").update(width=128, height=128)
    find(graph, "PrimitiveInt")["value"] = 5
    [picture] = paint(graph).pictures
    pipeline = WuerstchenPipeline.load(checkpoints / TINY, device="cpu", dtype="fp32")
    [same] = pipeline.generate(text, seed=5, width=128, height=128)
    assert deviation(picture, same) <= LIMIT
    [cut] = pipeline.generate("a red apple on a blue background", seed=5, width=128, height=128)
    assert deviation(picture, cut) > 0.5


HALVES = (Scene(0, 2, 0), Scene(23, 4, 0))  # a red apple on yellow, a cat on blue


def test_two_prompts_combined_by_mask_paint_a_picture_each(
    shipped: Graph, paint: Callable[[Graph], Outcome], judge: Judge
) -> None:
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
            given = {
                "conditioning": [f"text {i}", output],
                "mask": mask,
                "strength": 1.0,
                "set_cond_area": "mask bounds",
            }
            masked[stage].append(add(f"{stage} {i}", "ConditioningSetMask", **given))
    for stage, (left, right) in masked.items():
        add(stage, "ConditioningCombine", conditioning_1=left, conditioning_2=right)
    find(shipped, "WuerstchenPriorSample")["positive"] = ["prior", 0]
    find(shipped, "WuerstchenDecoderConditioning")["conditioning"] = ["decoder", 0]
    [picture] = paint(shipped).pictures
    for scene, half in zip(HALVES, halves(picture), strict=True):
        assert judge.identify(np.asarray(half), scene) == scene
