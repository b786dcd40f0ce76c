"""How the shipped model is measured and shown: numbers that count mistakes, the README's table, preview factors."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_model import write_tiny_bundle

from wuerstchen_core import WuerstchenPipeline
from wuerstchen_core.checkpoints import PARTS_OF
from wuerstchen_core.demo.judge import Judge, wilson_interval
from wuerstchen_core.demo.recipe import edits, evaluate, lora, remake
from wuerstchen_core.demo.vocabulary import COLOURS, THINGS, Scene, caption, held_out, scenes
from wuerstchen_core.training.pictures import DemoPictures

pytest.importorskip("resvg_py", reason="drawing needs resvg-py")

ROOT = Path(__file__).parents[1]
# On the two grounds of test_demo_judge, whose references are slow to draw; the first and the last share a ground.
WANTED = [Scene(0, 0, 0), Scene(4, 3, 1), Scene(9, 3, 1), Scene(5, 0, 0)]
RECONSTRUCTED = [30.0, 26.0]


def pictures(wanted: Sequence[Scene]) -> list[Image.Image]:
    from wuerstchen_core.demo.artwork import draw

    return [draw(scene) for scene in wanted]


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge()


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> WuerstchenPipeline:
    bundle = write_tiny_bundle(tmp_path_factory.mktemp("tiny") / "tiny.safetensors")
    return WuerstchenPipeline.load(bundle, device="cpu", dtype="fp32")


class TruePictures:
    """A pipeline that paints every prompt perfectly."""

    def __init__(self) -> None:
        self.scenes = {caption(scene): scene for scene in scenes()}
        self.metadata: dict[str, Any] = {}  # all that can be drawn
        self.asked: list[tuple[list[str], int, dict[str, Any]]] = []

    def generate(self, prompts: list[str], seed: int, **changes: Any) -> list[Image.Image]:
        self.asked.append((prompts, seed, changes))
        return pictures([self.scenes[prompt] for prompt in prompts])


def test_true_pictures_are_all_right(judge: Judge) -> None:
    rows = evaluate.judge_pictures(judge, WANTED, pictures(WANTED))
    numbers = evaluate.summary(rows, rows[:2], RECONSTRUCTED)
    low = round(100 * wilson_interval(4, 4)[0], 1)
    assert numbers["thing"] == numbers["background"] == {"percent": 100.0, "interval": [low, 100.0], "count": 4}
    assert {size: part["count"] for size, part in numbers["by_size"].items()} == {"large": 2, "small": 2}
    assert numbers["psnr"] == {"mean": 28.0, "min": 26.0, "count": 2}
    assert numbers["mistakes"] == numbers["backgrounds_missed"] == []
    assert json.loads(json.dumps(numbers)) == numbers


def test_mistakes_are_counted_and_named(judge: Judge) -> None:
    """Two show another thing of the same ground, the third nothing at all, on cyan; only the last is right."""
    nothing = Image.new("RGB", (256, 256), (0, 255, 255))
    other, last = pictures(WANTED[2:])
    rows = evaluate.judge_pictures(judge, WANTED, [last, other, nothing, last])
    numbers = evaluate.summary(rows, rows[2:], RECONSTRUCTED)
    assert numbers["thing"]["percent"] == 25.0 and numbers["another_thing"]["percent"] == 50.0
    assert numbers["background"]["percent"] == 75.0
    assert numbers["compressed"]["percent"] == 50.0 and numbers["compressed"]["count"] == 2
    assert numbers["thing"]["interval"] == [round(100 * bound, 1) for bound in wilson_interval(1, 4)]
    assert numbers["by_size"]["large"]["percent"] == 50.0 and numbers["by_size"]["small"]["percent"] == 0.0
    names = [THINGS[5].name, THINGS[9].name, "nothing"]
    assert numbers["mistakes"] == [f"{caption(s)}: {name}" for s, name in zip(WANTED, names, strict=False)]
    assert numbers["backgrounds_missed"] == [caption(WANTED[2])]


def test_a_size_that_was_not_painted_is_left_out(judge: Judge) -> None:
    rows = evaluate.judge_pictures(judge, WANTED[:1], pictures(WANTED[:1]))
    numbers = evaluate.summary(rows, rows, RECONSTRUCTED)
    assert list(numbers["by_size"]) == ["large"]


def test_evaluation_paints_held_out_scenes_with_every_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        evaluate,
        "reconstruct",
        lambda pipe, wanted, decoder_steps: (pictures(wanted), [float(decoder_steps), len(wanted)]),
    )
    pipe: Any = TruePictures()
    every = 39  # of 116 pairs: three, so six scenes
    numbers = evaluate.evaluate(pipe, seeds=2, every=every, decoder_steps=7)
    assert numbers["thing"]["percent"] == numbers["background"]["percent"] == 100 and numbers["thing"]["count"] == 12
    assert {size: part["count"] for size, part in numbers["by_size"].items()} == {"large": 6, "small": 6}
    assert numbers["psnr"] == {"mean": 6.5, "min": 6.0, "count": 2}
    assert numbers["compressed"]["percent"] == 100 and numbers["compressed"]["count"] == 6
    assert [(seed, changes) for _, seed, changes in pipe.asked] == [
        (1000, {"decoder_steps": 7}),
        (2000, {"decoder_steps": 7}),
    ]
    assert all(held_out(pipe.scenes[prompt]) for prompts, *_ in pipe.asked for prompt in prompts)


def test_every_held_out_scene_counts_and_batches_keep_their_seeds() -> None:
    wanted = evaluate.held_out_scenes()
    assert len(wanted) == 232 and {scene.thing for scene in wanted} == set(range(len(THINGS)))
    assert {scene.colour for scene in wanted} == set(range(len(COLOURS)))
    pipe: Any = TruePictures()
    assert len(evaluate.paint(pipe, wanted[:20], 100, prior_steps=2)) == 20
    assert [(len(prompts), seed) for prompts, seed, _ in pipe.asked] == [(16, 100), (4, 116)]


def test_reconstruction_is_measured(pipe: WuerstchenPipeline) -> None:
    one, two, own = (evaluate.reconstruct(pipe, WANTED[:1], decoder_steps=steps)[1] for steps in (1, 2, None))
    assert len(one) == 1 and 0 < one[0] < 40 and one != two
    assert own == two  # the model's own number of steps
    images, values = evaluate.reconstruct(pipe, WANTED[2:])
    pairs = zip(pictures(WANTED[2:]), images, strict=True)
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
    rest = {"every": 1, "schedule": None, "prior_guidance": None, "decoder_steps": None}
    assert calls == [("m", {"seeds": 1, "prior_steps": 9, **rest})]
    assert json.loads((tmp_path / "out.json").read_text()) == json.loads(capsys.readouterr().out) == {"thing": 1}


def test_factors_of_a_linear_map_are_found() -> None:
    latents = torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    factors, bias = torch.linspace(-0.3, 0.4, 12).view(4, 3), torch.tensor([0.1, -0.2, 0.05])
    colours = torch.einsum("nchw,cd->ndhw", latents, factors) + bias[:, None, None]
    images = ((colours + 1) / 2).repeat_interleave(4, 2).repeat_interleave(4, 3)
    found = remake.fit_factors(latents, images)
    assert np.abs(np.array(found["factors"]) - factors.numpy()).max() < 1e-4
    assert np.abs(np.array(found["bias"]) - bias.numpy()).max() < 1e-4


NUMBERS = {
    "thing": {"percent": 96.5, "interval": [95.0, 97.6], "count": 696},
    "another_thing": {"percent": 1.0, "interval": [0.5, 2.1], "count": 696},
    "background": {"percent": 99.9, "interval": [99.2, 100.0], "count": 696},
    "by_size": {"large": {"percent": 97.0, "interval": [94.6, 98.3], "count": 348}},
    "compressed": {"percent": 98.3, "interval": [95.7, 99.3], "count": 232},
    "psnr": {"mean": 26.1, "min": 21.3, "count": 232},
}


def test_the_table_holds_the_numbers() -> None:
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in remake.number_table(NUMBERS).splitlines()]
    assert all(len(row) == 4 for row in rows)
    assert rows[2:] == [
        ["the right thing", "96.5 %", "95.0 to 97.6 %", "696"],
        ["the right thing, large", "97.0 %", "94.6 to 98.3 %", "348"],
        ["another thing", "1.0 %", "0.5 to 2.1 %", "696"],
        ["the right background", "99.9 %", "99.2 to 100.0 %", "696"],
        ["the right thing after 42.67x compression", "98.3 %", "95.7 to 99.3 %", "232"],
        ["the picture itself after it", "26.1 dB", "worst 21.3 dB", "232"],
    ]


def test_the_readme_has_a_place_for_the_table() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    remake.with_table(readme, "TABLE", remake.MARKS_V1)
    start, end = remake.MARKS
    once = remake.with_table(readme, "TABLE")
    assert f"{start}\nTABLE\n{end}" in once
    assert remake.with_table(once, "TABLE") == once
    around = [text.split(start)[0] + text.split(end)[1] for text in (readme, once)]
    assert around[0] == around[1]
    for broken in ("no marks", f"{end} {start}", f"{start} {start} {end}"):
        with pytest.raises(ValueError, match="^the README has no place for the numbers: put "):
            remake.with_table(broken, "TABLE")


def test_one_command_remakes_all_that_follows_from_the_weights(
    pipe: WuerstchenPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readme = "before\n{0[0]}\n{2}{0[1]}\nbetween\n{1[0]}\n{3}{1[1]}\nafter\n"
    marks = remake.MARKS, remake.MARKS_V1
    (tmp_path / "README.md").write_text(readme.format(*marks, "old\n", ""))
    v1 = WuerstchenPipeline()
    quick = WuerstchenPipeline(metadata=pipe.metadata, **{name: getattr(pipe, name) for name in PARTS_OF["v2"]})
    quick.sampling = quick.sampling.changed(width=64, height=64, prior_steps=1, prior_guidance=1.0, decoder_steps=1)
    monkeypatch.setattr(WuerstchenPipeline, "load", lambda source: v1 if source == "demo-v1" else quick)
    monkeypatch.setattr(remake, "ROOT", tmp_path)
    monkeypatch.setattr(remake, "DEMO", tmp_path)
    monkeypatch.setattr(remake, "SHEET", tmp_path / "docs" / "sheet.jpg")
    monkeypatch.setattr(edits, "SHEET", tmp_path / "docs" / "edits.jpg")
    monkeypatch.setattr(remake, "EVALUATION", tmp_path / "evaluation.json")
    monkeypatch.setattr(remake, "EVALUATION_V1", tmp_path / "evaluation_v1.json")
    fewer = NUMBERS | {"another_thing": NUMBERS["thing"]}
    monkeypatch.setattr(remake, "evaluate", lambda pipe: fewer if pipe is v1 else NUMBERS)
    few = DemoPictures({"canvas": 64, "things": 2}, held=True)
    monkeypatch.setattr(remake, "DemoPictures", lambda held: few)
    trained: list[Path] = []
    monkeypatch.setattr(lora, "remake", trained.append)
    remake.main()
    assert Image.open(tmp_path / "docs" / "sheet.jpg").size == (1024, 512)
    assert Image.open(tmp_path / "docs" / "edits.jpg").size == (768, 384)
    assert trained == [tmp_path]
    factors = json.loads((tmp_path / "preview_factors.json").read_text())
    assert {name: np.shape(value["factors"]) for name, value in factors.items()} == {
        "prior": (16, 3),
        "decoder": (4, 3),
    }
    assert all(np.shape(value["bias"]) == (3,) for value in factors.values())
    assert json.loads((tmp_path / "evaluation.json").read_text()) == NUMBERS
    assert json.loads((tmp_path / "evaluation_v1.json").read_text()) == fewer
    tables = (f"{remake.number_table(numbers)}\n" for numbers in (NUMBERS, fewer))
    assert (tmp_path / "README.md").read_text() == readme.format(*marks, *tables)


def test_a_readme_without_marks_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "README.md").write_text("nothing here")
    monkeypatch.setattr(remake, "ROOT", tmp_path)
    monkeypatch.setattr(WuerstchenPipeline, "load", lambda source: pytest.fail("loaded"))
    with pytest.raises(ValueError, match="^the README has no place for the numbers: "):
        remake.main()
