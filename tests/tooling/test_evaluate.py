"""The evaluation of the shipped model: rates, lists of mistakes, and scenes chosen by the metadata."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.tiny_model import write_tiny_bundle
from PIL import Image

from tools.demo import evaluate
from tools.demo.judge import Judge, wilson_interval
from wuerstchen_core import WuerstchenPipeline
from wuerstchen_core.demo.vocabulary import (
    COLOURS,
    LAYOUTS,
    POSITIONS,
    SHAPES,
    SIMPLE,
    THINGS,
    TRAINED_THINGS,
    Scene,
    caption,
    held_out,
    scenes,
)

pytest.importorskip("resvg_py", reason="drawing needs resvg-py")

# On the two backgrounds of test_judge, whose references are slow to draw; the first and the last share one.
SCENES = [Scene(0, 0, 0), Scene(4, 3, 1), Scene(9, 3, 1), Scene(5, 0, 0)]
RECONSTRUCTED = [30.0, 26.0]
OTHERS = ("by_place", "by_shape", "by_side", "pairs", "twice", "thrice")


def drawings(scenes: Sequence[Scene]) -> list[Image.Image]:
    from wuerstchen_core.demo.artwork import draw

    return [draw(scene) for scene in scenes]


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge()


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> WuerstchenPipeline:
    bundle = write_tiny_bundle(tmp_path_factory.mktemp("tiny") / "tiny.safetensors")
    return WuerstchenPipeline.load(bundle, device="cpu", dtype="fp32")


class PerfectPipeline:
    """Generates every prompt perfectly."""

    def __init__(self) -> None:
        self.scenes = {caption(scene): scene for scene in scenes(LAYOUTS[:4])}
        self.metadata: dict[str, Any] = {}  # all things, in the centre of squares
        self.calls: list[tuple[list[str], int, dict[str, Any]]] = []

    def generate(self, prompts: list[str], seed: int, width: int, height: int, **changes: Any) -> list[Image.Image]:
        self.calls.append((prompts, seed, changes))
        from wuerstchen_core.demo.artwork import draw_all

        canvas = min(width, height)
        shape = list(SHAPES.values()).index((width * 256 // canvas, height * 256 // canvas))
        found = [self.scenes[prompt]._replace(shape=shape) for prompt in prompts]
        return list(map(Image.fromarray, draw_all(found, canvas)))


def test_drawings_are_all_right(judge: Judge) -> None:
    rows = evaluate.judge_images(judge, SCENES, drawings(SCENES))
    numbers = evaluate.summary(rows, rows[:2], RECONSTRUCTED)
    low = round(100 * wilson_interval(4, 4)[0], 1)
    assert numbers["thing"] == numbers["background"] == {"percent": 100.0, "interval": [low, 100.0], "count": 4}
    assert {size: part["count"] for size, part in numbers["by_size"].items()} == {"large": 2, "small": 2}
    assert numbers["psnr"] == {"mean": 28.0, "min": 26.0, "count": 2}
    assert numbers["mistakes"] == numbers["backgrounds_missed"] == []
    assert json.loads(json.dumps(numbers)) == numbers


def test_mistakes_are_counted_and_named(judge: Judge) -> None:
    """Two images show another thing on the same background, the third nothing on cyan; only the last is right."""
    nothing = Image.new("RGB", (256, 256), (0, 255, 255))
    other, last = drawings(SCENES[2:])
    rows = evaluate.judge_images(judge, SCENES, [last, other, nothing, last])
    numbers = evaluate.summary(rows, rows[2:], RECONSTRUCTED)
    assert numbers["thing"]["percent"] == 25.0 and numbers["another_thing"]["percent"] == 50.0
    assert numbers["background"]["percent"] == 75.0
    assert numbers["compressed"]["percent"] == 50.0 and numbers["compressed"]["count"] == 2
    assert numbers["thing"]["interval"] == [round(100 * bound, 1) for bound in wilson_interval(1, 4)]
    assert numbers["by_size"]["large"]["percent"] == 50.0 and numbers["by_size"]["small"]["percent"] == 0.0
    names = [THINGS[5].name, THINGS[9].name, "nothing"]
    assert numbers["mistakes"] == [f"{caption(s)}: {name}" for s, name in zip(SCENES, names, strict=False)]
    assert numbers["backgrounds_missed"] == [caption(SCENES[2])]


def test_a_size_without_images_is_left_out(judge: Judge) -> None:
    rows = evaluate.judge_images(judge, SCENES[:1], drawings(SCENES[:1]))
    numbers = evaluate.summary(rows, rows, RECONSTRUCTED)
    assert list(numbers["by_size"]) == ["large"]


def test_evaluation_generates_held_out_scenes_with_every_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        evaluate,
        "reconstruct",
        lambda pipe, scenes, decoder_steps: (drawings(scenes), [float(decoder_steps), len(scenes)]),
    )
    pipe: Any = PerfectPipeline()
    every = 103  # of 205 pairs: two, so four scenes
    numbers = evaluate.evaluate(pipe, seeds=2, every=every, decoder_steps=7)
    assert numbers["thing"]["percent"] == numbers["background"]["percent"] == 100 and numbers["thing"]["count"] == 8
    assert {size: part["count"] for size, part in numbers["by_size"].items()} == {"large": 4, "small": 4}
    assert numbers["psnr"] == {"mean": 5.5, "min": 4.0, "count": 2}
    assert numbers["compressed"]["percent"] == 100 and numbers["compressed"]["count"] == 4
    assert [(seed, changes) for _, seed, changes in pipe.calls] == [
        (1000, {"decoder_steps": 7}),
        (2000, {"decoder_steps": 7}),
    ]
    assert all(held_out(pipe.scenes[prompt]) for prompts, *_ in pipe.calls for prompt in prompts)
    assert numbers.keys().isdisjoint(OTHERS)


def test_other_positions_shapes_and_pairs_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "reconstruct", lambda pipe, scenes: (drawings(scenes), [30.0]))
    known = evaluate.held_out_scenes
    monkeypatch.setattr(  # on the two backgrounds
        evaluate, "held_out_scenes", lambda *args: [s for s in known(*args) if s.colour == (0, 3)[s.size]]
    )
    pipe: Any = PerfectPipeline()
    pipe.metadata = {"vocabulary": {"layouts": LAYOUTS[:4], "shapes": ["square", "tall"], "larger": [384]}}
    numbers = evaluate.evaluate(pipe, seeds=1, every=205)
    whole = {"percent": 100.0, "interval": [20.7, 100.0], "count": 1}
    assert numbers["by_place"] == dict.fromkeys(POSITIONS, whole)
    for group, names in (("by_shape", ["square", "tall"]), ("by_side", ["384"])):
        assert {name: part["count"] for name, part in numbers[group].items()} == dict.fromkeys(names, 3)
        assert {part["percent"] for part in numbers[group].values()} == {100.0}
    assert (numbers["pairs"]["both"]["percent"], numbers["pairs"]["one"]["percent"]) == (100.0, 0.0)
    assert numbers["pairs"]["both"]["count"] == 2 and numbers["mistakes"] == numbers["backgrounds_missed"] == []
    assert [seed for _, seed, _ in pipe.calls] == [1000] + [evaluate.SAMPLE_SEED] * 10
    assert json.loads(json.dumps(numbers)) == numbers


def test_samples_are_held_out_and_known_to_the_model() -> None:
    names = [thing.name for thing in THINGS[:20]]
    shapes = ["square", "tall"]
    known = {"things": names, "layouts": LAYOUTS[:-1], "shapes": shapes, "larger": [512]}
    found = evaluate.other_scenes({"vocabulary": known}, 60)
    assert list(found) == list(OTHERS) and found == evaluate.other_scenes({"vocabulary": known}, 60)
    for index, these in enumerate(found["by_place"].values()):
        assert len(these) == 32 and {scene.position for scene in these} == {index} and {s.size for s in these} == {1}
    for name in shapes:
        index = list(SHAPES).index(name)
        assert Counter(s.layout for s in found["by_shape"][name]) == {"large": 32, "small": 32, "corner": 60}
        for layout, group in (("pair", "pairs"), ("two", "twice"), ("three", "thrice")):
            assert {(scene.layout, scene.shape) for scene in found[group][name]} == {(layout, index)}
        assert len(found["pairs"][name]) == 30 and {s.shape for s in found["by_shape"][name]} == {index}
    assert {scene.shape for scene in found["by_side"]["512"]} == {0}
    every = [scene for group in found.values() for these in group.values() for scene in these]
    assert all(map(held_out, every)) and {s.thing for s in every} <= set(range(20)) >= {s.other or 0 for s in every}
    assert (
        evaluate.other_scenes({"vocabulary": {**known, "layouts": list(SIMPLE), "shapes": ["square"], "larger": []}})
        == {}
    )
    assert evaluate.other_scenes({}) == {}


def test_mistakes_in_other_scenes_are_counted_and_named(judge: Judge) -> None:
    """A thing in the right and a wrong corner; a pair right, half right and swapped; a thing twice on a wide image."""
    corner, pair, wide = Scene(0, 3, 1, 2), Scene(0, 3, 1, 0, 1, 9), Scene(9, 3, 1, 0, 2)
    half, swapped = pair._replace(other=4), pair._replace(thing=9, other=0)
    twice = np.array(drawings([wide])[0])
    twice[:, :80] = twice[:, 152:232]
    scenes = {"by_place": {"top right": [corner] * 2}, "by_shape": {"landscape": [wide] * 2}, "pairs": {"": [pair] * 3}}
    images = {
        "by_place": {"top right": drawings([corner, corner._replace(position=1)])},
        "by_shape": {"landscape": [Image.fromarray(twice), *drawings([wide])]},
        "pairs": {"": drawings([pair, half, swapped])},
    }
    rows = {
        group: {name: evaluate.judge_images(judge, these, images[group][name]) for name, these in parts.items()}
        for group, parts in scenes.items()
    }
    right = evaluate.judge_images(judge, SCENES, drawings(SCENES))
    numbers = evaluate.summary(right, right, RECONSTRUCTED, rows)
    assert numbers["thing"]["percent"] == 100.0 and numbers["thing"]["count"] == 4
    assert [numbers[group][name]["percent"] for group in ("by_place", "by_shape") for name in scenes[group]] == [50, 50]
    assert [numbers["pairs"][name]["percent"] for name in ("both", "one")] == [33.3, 33.3]
    names = [THINGS[thing].name for thing in (0, 4, 9)]
    assert numbers["mistakes"] == [
        f"{caption(corner)}: nothing",
        f"{caption(wide)} (landscape): nothing",
        f"{caption(pair)} (portrait): {names[0]} and {names[1]}",
        f"{caption(pair)} (portrait): {names[2]} and {names[0]}",
    ]
    assert numbers["backgrounds_missed"] == []


def test_every_held_out_scene_counts_and_seeds_do_not_depend_on_batches() -> None:
    held = evaluate.held_out_scenes({})
    assert len(held) == 410 and {scene.thing for scene in held} == set(range(TRAINED_THINGS))
    assert {scene.colour for scene in held} == set(range(len(COLOURS)))
    pipe: Any = PerfectPipeline()
    assert len(evaluate.generate(pipe, held[:20], 100, prior_steps=2)) == 20
    assert [(len(prompts), seed) for prompts, seed, _ in pipe.calls] == [(16, 100), (4, 116)]
    pipe.calls.clear()
    shapes = [scene._replace(shape=shape) for shape in (0, 1) for scene in held[:20]]
    assert [image.size for image in evaluate.generate(pipe, shapes, 100)] == [(256, 256)] * 20 + [(256, 384)] * 20
    assert [(len(prompts), seed) for prompts, seed, _ in pipe.calls] == [(16, 100), (4, 116), (16, 120), (4, 136)]


def test_reconstruction_is_measured(pipe: WuerstchenPipeline) -> None:
    one, two, own = (evaluate.reconstruct(pipe, SCENES[:1], decoder_steps=steps)[1] for steps in (1, 2, None))
    assert len(one) == 1 and 0 < one[0] < 40 and one != two
    assert own == two  # the default of the model
    images, values = evaluate.reconstruct(pipe, SCENES[2:])
    pairs = zip(drawings(SCENES[2:]), images, strict=True)
    assert values == [evaluate.psnr(np.asarray(a), np.asarray(b)) for a, b in pairs]


def test_the_command_writes_the_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[tuple[Any, dict[str, Any]]] = []

    def fake(pipe: Any, **options: Any) -> dict[str, Any]:
        calls.append((pipe, options))
        return {"thing": 1}

    monkeypatch.setattr(evaluate, "evaluate", fake)
    monkeypatch.setattr(WuerstchenPipeline, "load", lambda model: model)
    evaluate.main(["--model", "m", "--seeds", "1", "--prior-steps", "9", "--json", str(tmp_path / "out.json")])
    rest = {"every": 1, "second_eye": False, "schedule": None, "prior_guidance": None, "decoder_steps": None}
    assert calls == [("m", {"seeds": 1, "prior_steps": 9, **rest})]
    assert json.loads((tmp_path / "out.json").read_text()) == json.loads(capsys.readouterr().out) == {"thing": 1}
