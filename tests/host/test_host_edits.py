"""The shipped workflows that start from images: their content, the unmasked area, and extreme settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from bundles import Generate
from images import LARGE, check_image, content, pixels
from PIL import Image

from tools.comfyui.graphs import api_form, workflow
from tools.demo.judge import Judge, psnr
from wuerstchen_core.demo.vocabulary import COLOURS, THINGS, Scene

pytestmark = pytest.mark.newest

KEPT = 30.0  # dB, least PSNR of an area that must not change
SMALL = 1


class Workflow:
    """A shipped workflow as a prompt, whose nodes are found by class and index."""

    def __init__(self, name: str, object_info: dict[str, Any], generate: Generate):
        self.name, self.generate = name, generate
        self.graph = api_form(workflow(name), object_info)

    def key(self, kind: str, index: int = -1) -> str:
        return [key for key, node in self.graph.items() if node["class_type"] == kind][index]

    def inputs(self, kind: str, index: int = -1) -> dict[str, Any]:
        return self.graph[self.key(kind, index)]["inputs"]

    def as_it_ships(self) -> list[Image.Image]:
        outcome = self.generate(self.graph)
        check_image(self.name, outcome)
        return outcome.pictures

    def run(self, index: int = -1, **changes: Any) -> list[Image.Image]:
        """Returns the images with other inputs of one of the prior's nodes."""
        self.inputs("WuerstchenPriorSample", index).update(changes)
        return self.generate(self.graph).pictures

    def reconstruction(self, index: int = -1) -> Image.Image:
        """Returns Stage B's image of an encoded image, with the same seed and without an edit."""
        graph = {key: {**node, "inputs": dict(node["inputs"])} for key, node in self.graph.items()}
        graph[self.key("WuerstchenDecoderConditioning")]["inputs"]["stage_c"] = [
            self.key("WuerstchenImageEncode", index),
            0,
        ]
        graph[self.key("SaveImage")]["inputs"]["images"] = [self.key("WuerstchenVAEDecode"), 0]
        return self.generate(graph).pictures[0]

    def before_compositing(self) -> Image.Image:
        graph = {**self.graph, self.key("SaveImage"): {"class_type": "SaveImage", "inputs": {"filename_prefix": "x"}}}
        graph[self.key("SaveImage")]["inputs"]["images"] = [self.key("WuerstchenVAEDecode"), 0]
        return self.generate(graph).pictures[0]


@pytest.fixture
def load(object_info: dict[str, Any], generate: Generate) -> Callable[[str], Workflow]:
    return lambda name: Workflow(name, object_info, generate)


Load = Callable[[str], Workflow]


def shown_small(judge: Judge, picture: Image.Image) -> str:
    array = pixels(picture)
    return THINGS[judge.identify(array, Scene(0, judge.background(array), SMALL)).thing].name


def similarity(a: Image.Image, b: Image.Image, where: np.ndarray | None = None) -> float:
    """Returns the PSNR in dB of two images, or of a part of them."""
    where = np.ones(a.size[::-1], dtype=bool) if where is None else where
    return psnr(pixels(a)[where], pixels(b)[where])


def outside(left: int, top: int, right: int, bottom: int) -> np.ndarray:
    """Returns a mask of 256x256 pixels without a box."""
    where = np.ones((256, 256), dtype=bool)
    where[top:bottom, left:right] = False
    return where


def test_reconstruct_keeps_the_image(load: Load, judge: Judge) -> None:
    before, after = load("reconstruct").as_it_ships()
    assert content(judge, before) == content(judge, after) == ("house", "yellow")
    assert similarity(before, after) >= KEPT  # observed 43 dB: images of the model itself are easy


def test_variations_differ_and_keep_the_prompts_thing(load: Load, judge: Judge) -> None:
    shown = [content(judge, picture) for picture in load("image_variation").as_it_ships()]
    assert len(shown) == 4 and {thing for thing, _ in shown} == {"tree"}
    assert ("tree", "yellow") in shown and len(set(shown)) > 2


def test_denoise_sets_how_much_of_the_image_another_prompt_keeps(load: Load, judge: Judge) -> None:
    edit = load("image_to_image")
    _, after = edit.as_it_ships()
    assert content(judge, after) == ("fox", "yellow")
    assert similarity(edit.run(denoise=0.0)[1], edit.reconstruction()) == np.inf
    _, ignored = edit.run(denoise=1.0)
    edit.inputs("WuerstchenTextEncode", 0)["text"] = "a dog on a red background"  # another image to start from
    other, still_ignored = edit.run(denoise=1.0)
    assert content(judge, other) == ("dog", "red")
    assert similarity(ignored, still_ignored) == np.inf and similarity(ignored, after) < KEPT


def test_inpainting_changes_only_the_masked_area(load: Load, judge: Judge) -> None:
    edit = load("inpaint")
    before, after = edit.as_it_ships()
    assert (shown_small(judge, before), shown_small(judge, after)) == ("cat", "tree")
    mask = outside(44, 44, 212, 212)
    assert similarity(before, after, mask) == np.inf
    edited = edit.before_compositing()
    assert shown_small(judge, edited) == "tree"
    assert similarity(edited, edit.reconstruction(), mask) >= KEPT  # observed 60 dB


def test_differential_diffusion_leaves_nothing_of_the_image_in_a_grey_mask(load: Load, judge: Judge) -> None:
    edit = load("inpaint")
    edit.inputs("SolidMask")["value"] = 0.75
    mixed = edit.before_compositing()
    edit.graph["differential"] = {
        "class_type": "DifferentialDiffusion",
        "inputs": {"model": edit.inputs("WuerstchenPriorSample")["model"], "strength": 1.0},
    }
    edit.inputs("WuerstchenPriorSample")["model"] = ["differential", 0]
    replaced = edit.before_compositing()
    assert shown_small(judge, replaced) == "tree" != shown_small(judge, mixed)


def test_outpainting_continues_half_an_image(load: Load, judge: Judge) -> None:
    edit = load("outpaint")
    source, after = edit.as_it_ships()
    assert content(judge, after) == ("red apple", "blue")
    assert similarity(source, after, outside(128, 0, 256, 256)) == np.inf
    edited, kept = edit.before_compositing(), outside(85, 0, 256, 256)
    assert content(judge, edited) == ("red apple", "blue")
    assert similarity(edited, edit.reconstruction(), kept) >= KEPT  # observed 33 dB: its grey half tints it
    assert similarity(edited, source, kept) >= KEPT  # observed 44 dB


def test_interpolated_images_mix_both_and_are_exact_at_the_ends(load: Load, judge: Judge) -> None:
    edit = load("interpolate_pictures")
    first, between, second = edit.as_it_ships()
    assert [content(judge, x) for x in (first, second)] == [("cat", "yellow"), ("frog", "blue")]
    middle = pixels(between)
    background = judge.background(middle)
    assert list(COLOURS)[background] == "green"
    nearest = judge.distances(middle, Scene(0, background, LARGE))[0].argsort()[:2]
    assert {THINGS[thing].name for thing in nearest} == {"cat", "frog"}
    for end in (0, 1):
        edit.inputs("WuerstchenLatentInterpolate")["factor"] = float(end)
        assert similarity(edit.run(denoise=0.0)[1], edit.reconstruction(end)) == np.inf


@pytest.mark.parametrize(
    ("name", "shown"), [("interpolate_prompts", ("tree", "green")), ("style_mix", ("red apple", "orange"))]
)
def test_interpolated_prompts_mix_both(load: Load, judge: Judge, name: str, shown: tuple[str, str]) -> None:
    assert content(judge, load(name).as_it_ships()[0]) == shown


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "kind", "factor", "ends"),
    [
        (
            "interpolate_prompts",
            "WuerstchenConditioningInterpolate",
            "factor",
            {0.0: ("tree", "yellow"), 1.0: ("tree", "blue")},
        ),
        (
            "style_mix",
            "ConditioningAverage",
            "conditioning_to_strength",
            {1.0: ("red apple", "red"), 0.0: ("red apple", "yellow")},
        ),
    ],
)
def test_interpolated_prompts_are_exact_at_the_ends(
    load: Load, judge: Judge, name: str, kind: str, factor: str, ends: dict[float, Any]
) -> None:
    edit = load(name)
    for end, expected in ends.items():
        edit.inputs(kind)[factor] = end
        assert content(judge, edit.run()[0]) == expected
