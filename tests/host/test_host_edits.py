"""The workflows that take pictures in, run as they ship: judged, measured before compositing, and at both ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_host_workflows import LARGE, check_picture, pixels, shows

from tools.comfyui.client import Outcome
from tools.comfyui.graphs import api_form, workflow
from tools.demo.judge import Judge, psnr
from wuerstchen_core.demo.vocabulary import COLOURS, THINGS, Scene

Graph = dict[str, Any]
Paint = Callable[[Graph], Outcome]

pytestmark = pytest.mark.newest

KEPT = 30.0  # dB at least
SMALL = 1


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge()


class Workflow:
    """A workflow that ships, whose nodes are found by kind and, where there are several, by their place among them."""

    def __init__(self, name: str, object_info: dict[str, Any], paint: Paint):
        self.name, self.paint = name, paint
        self.graph = api_form(workflow(name), object_info)

    def key(self, kind: str, place: int = -1) -> str:
        return [key for key, node in self.graph.items() if node["class_type"] == kind][place]

    def inputs(self, kind: str, place: int = -1) -> dict[str, Any]:
        return self.graph[self.key(kind, place)]["inputs"]

    def as_it_ships(self) -> list[Image.Image]:
        outcome = self.paint(self.graph)
        check_picture(self.name, outcome)
        return outcome.pictures

    def run(self, place: int = -1, **changes: Any) -> list[Image.Image]:
        """The pictures with other inputs of one of the prior's nodes."""
        self.inputs("WuerstchenPriorSample", place).update(changes)
        return self.paint(self.graph).pictures

    def reconstruction(self, place: int = -1) -> Image.Image:
        """What Stage B makes of an encoded picture, with the same seed and nothing painted over."""
        graph = {key: {**node, "inputs": dict(node["inputs"])} for key, node in self.graph.items()}
        graph[self.key("WuerstchenDecoderConditioning")]["inputs"]["stage_c"] = [
            self.key("WuerstchenImageEncode", place),
            0,
        ]
        graph[self.key("SaveImage")]["inputs"]["images"] = [self.key("WuerstchenVAEDecode"), 0]
        return self.paint(graph).pictures[0]

    def before_compositing(self) -> Image.Image:
        graph = {**self.graph, self.key("SaveImage"): {"class_type": "SaveImage", "inputs": {"filename_prefix": "x"}}}
        graph[self.key("SaveImage")]["inputs"]["images"] = [self.key("WuerstchenVAEDecode"), 0]
        return self.paint(graph).pictures[0]


@pytest.fixture
def load(object_info: dict[str, Any], paint: Paint) -> Callable[[str], Workflow]:
    return lambda name: Workflow(name, object_info, paint)


Load = Callable[[str], Workflow]


def shown_small(judge: Judge, picture: Image.Image) -> str:
    array = pixels(picture)
    return THINGS[judge.identify(array, Scene(0, judge.background(array), SMALL)).thing].name


def likeness(a: Image.Image, b: Image.Image, where: np.ndarray | None = None) -> float:
    """PSNR in dB of two pictures, or of a part of them."""
    where = np.ones(a.size[::-1], dtype=bool) if where is None else where
    return psnr(pixels(a)[where], pixels(b)[where])


def outside(left: int, top: int, right: int, bottom: int) -> np.ndarray:
    """All of 256x256 pixels but a box."""
    where = np.ones((256, 256), dtype=bool)
    where[top:bottom, left:right] = False
    return where


def test_a_picture_comes_back_through_the_compression(load: Load, judge: Judge) -> None:
    before, after = load("reconstruct").as_it_ships()
    assert shows(judge, before) == shows(judge, after) == ("cat", "yellow")
    assert likeness(before, after) >= KEPT  # 43 dB: the shipped model's own pictures are easy to it


def test_variations_differ_and_show_what_the_text_keeps(load: Load, judge: Judge) -> None:
    shown = [shows(judge, picture) for picture in load("image_variation").as_it_ships()]
    assert len(shown) == 4 and {thing for thing, _ in shown} == {"cat"}
    assert ("cat", "yellow") in shown and len(set(shown)) > 1


def test_another_prompt_keeps_what_it_does_not_say_as_far_as_the_strength(load: Load, judge: Judge) -> None:
    edit = load("image_to_image")
    _, after = edit.as_it_ships()
    assert shows(judge, after) == ("fox", "yellow")
    assert likeness(edit.run(denoise=0.0)[1], edit.reconstruction()) == np.inf
    _, ignored = edit.run(denoise=1.0)
    edit.inputs("WuerstchenTextEncode", 0)["text"] = "a dog on a red background"  # another picture to start from
    other, still_ignored = edit.run(denoise=1.0)
    assert shows(judge, other) == ("dog", "red")
    assert likeness(ignored, still_ignored) == np.inf and likeness(ignored, after) < KEPT


def test_inside_the_mask_is_what_the_prompt_says_and_outside_what_was(load: Load, judge: Judge) -> None:
    edit = load("inpaint")
    before, after = edit.as_it_ships()
    assert (shown_small(judge, before), shown_small(judge, after)) == ("cat", "tree")
    mask = outside(44, 44, 212, 212)
    assert likeness(before, after, mask) == np.inf
    painted = edit.before_compositing()
    assert shown_small(judge, painted) == "tree"
    assert likeness(painted, edit.reconstruction(), mask) >= KEPT  # 60 dB


def test_half_a_picture_is_painted_on(load: Load, judge: Judge) -> None:
    edit = load("outpaint")
    given, after = edit.as_it_ships()
    assert shows(judge, after) == ("red apple", "blue")
    assert likeness(given, after, outside(128, 0, 256, 256)) == np.inf
    painted, kept = edit.before_compositing(), outside(85, 0, 256, 256)
    assert shows(judge, painted) == ("red apple", "blue")
    assert likeness(painted, edit.reconstruction(), kept) >= KEPT  # 33 dB: its grey half tints the reconstruction
    assert likeness(painted, given, kept) >= KEPT  # 44 dB


def test_between_two_pictures_and_at_both_ends(load: Load, judge: Judge) -> None:
    edit = load("interpolate_pictures")
    first, between, second = edit.as_it_ships()
    assert [shows(judge, x) for x in (first, second)] == [("cat", "yellow"), ("frog", "blue")]
    middle = pixels(between)
    background = judge.background(middle)
    assert list(COLOURS)[background] == "green"
    nearest = judge.distances(middle, Scene(0, background, LARGE))[0].argsort()[:2]
    assert {THINGS[thing].name for thing in nearest} == {"cat", "frog"}
    for end in (0, 1):
        edit.inputs("WuerstchenLatentInterpolate")["factor"] = float(end)
        assert likeness(edit.run(denoise=0.0)[1], edit.reconstruction(end)) == np.inf


@pytest.mark.parametrize(
    ("name", "shown"), [("interpolate_prompts", ("tree", "green")), ("style_mix", ("red apple", "orange"))]
)
def test_between_two_prompts_lies_what_both_have_in_them(
    load: Load, judge: Judge, name: str, shown: tuple[str, str]
) -> None:
    assert shows(judge, load(name).as_it_ships()[0]) == shown


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
def test_both_ends_are_the_prompts(
    load: Load, judge: Judge, name: str, kind: str, factor: str, ends: dict[float, Any]
) -> None:
    edit = load(name)
    for end, wanted in ends.items():
        edit.inputs(kind)[factor] = end
        assert shows(judge, edit.run()[0]) == wanted
