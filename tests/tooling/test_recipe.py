"""What the shipped model says of itself, and what is remade of it: the README's table, sheets, preview factors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny_model import write_tiny_bundle
from PIL import Image

from tools.demo import build, curves, edits, lora, remake
from wuerstchen_core import WuerstchenPipeline
from wuerstchen_core.checkpoints import PARTS_OF
from wuerstchen_core.demo.vocabulary import COLOURS, LAYOUTS, SHAPES, SIMPLE, THINGS, TRAINED_THINGS, known_words
from wuerstchen_core.training.data.demo import DemoDataConfig, DemoDataset

pytest.importorskip("resvg_py", reason="drawing needs resvg-py")

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> WuerstchenPipeline:
    bundle = write_tiny_bundle(tmp_path_factory.mktemp("tiny") / "tiny.safetensors")
    return WuerstchenPipeline.load(bundle, device="cpu", dtype="fp32")


def test_a_bundle_names_what_its_prior_was_trained_on() -> None:
    v1, v2 = (build.trained_on(build.RECIPE / name) for name in ("prior_v1.toml", "prior.toml"))
    assert v1 == DemoDataConfig(things=12) and v2 == DemoDataConfig(layouts=LAYOUTS, shapes=tuple(SHAPES), most=1200)
    assert build.vocabulary(v1) == {
        "words": known_words(THINGS[:12], SIMPLE),
        "things": [thing.name for thing in THINGS[:12]],
        "colours": list(COLOURS),
        "sizes": ["large", "small"],
        "layouts": SIMPLE,
        "shapes": ("square",),
    }
    all_of_it = build.vocabulary(v2)
    assert (
        all_of_it["words"] == known_words(THINGS[:TRAINED_THINGS]) and len(all_of_it["things"]) == TRAINED_THINGS >= 128
    )
    assert all_of_it["layouts"] == LAYOUTS and all_of_it["shapes"] == tuple(SHAPES)
    assert "corner" in all_of_it["words"] and "corner" not in build.vocabulary(v1)["words"]


def test_factors_of_a_linear_map_are_found() -> None:
    latents = torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    factors, bias = torch.linspace(-0.3, 0.4, 12).view(4, 3), torch.tensor([0.1, -0.2, 0.05])
    colours = torch.einsum("nchw,cd->ndhw", latents, factors) + bias[:, None, None]
    images = ((colours + 1) / 2).repeat_interleave(4, 2).repeat_interleave(4, 3)
    found = remake.fit_factors(latents, images)
    assert np.abs(np.array(found["factors"]) - factors.numpy()).max() < 1e-4
    assert np.abs(np.array(found["bias"]) - bias.numpy()).max() < 1e-4


def test_curves_are_of_hundred_steps_each() -> None:
    rows = [{"step": step, "loss": float(step > 100)} for step in (50, 100, 150, 200, 230)]
    assert curves.means(rows) == ([50.0, 150.0, 250.0], [0.0, 1.0, 1.0])


def test_the_curve_of_a_second_training_goes_on_behind_the_first(tmp_path: Path) -> None:
    for name, steps in (("decoder", (20, 40)), ("decoder_again", (20,)), ("vqgan", (20,))):
        rows = [{"step": step, "seconds": step / 10, "loss": 1.0} for step in steps]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = [(row["step"], row["seconds"]) for row in curves.both(tmp_path, "decoder")]
    assert told == [(20, 2.0), (40, 4.0), (60, 6.0)]
    assert curves.both(tmp_path, "vqgan") == [{"step": 20, "seconds": 2.0, "loss": 1.0}]


NUMBERS = {
    "thing": {"percent": 96.5, "interval": [95.0, 97.6], "count": 696},
    "another_thing": {"percent": 1.0, "interval": [0.5, 2.1], "count": 696},
    "background": {"percent": 99.9, "interval": [99.2, 100.0], "count": 696},
    "by_size": {"large": {"percent": 97.0, "interval": [94.6, 98.3], "count": 348}},
    "compressed": {"percent": 98.3, "interval": [95.7, 99.3], "count": 232},
    "psnr": {"mean": 26.1, "min": 21.3, "count": 232},
}


def table_rows(numbers: dict[str, Any]) -> list[list[str]]:
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in remake.number_table(numbers).splitlines()]
    assert all(len(row) == 4 for row in rows)
    return rows[2:]


def test_the_table_holds_what_a_model_knows_further() -> None:
    part = NUMBERS["thing"]
    more = {"by_place": {"top left": part}, "by_shape": {"portrait": part}, "pairs": {"both": part, "one": part}}
    rows, simple = table_rows({**NUMBERS, **more}), table_rows(NUMBERS)
    assert [row for row in rows if row not in simple] == [
        ["the right thing in its place, top left", "96.5 %", "95.0 to 97.6 %", "696"],
        ["the right thing, whole and alone, portrait", "96.5 %", "95.0 to 97.6 %", "696"],
        ["two things, both right", "96.5 %", "95.0 to 97.6 %", "696"],
        ["two things, one right", "96.5 %", "95.0 to 97.6 %", "696"],
    ]


def test_the_table_holds_the_numbers() -> None:
    assert table_rows(NUMBERS) == [
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
    knows = build.vocabulary(DemoDataConfig(things=12, layouts=LAYOUTS, shapes=tuple(SHAPES)))
    quick = WuerstchenPipeline(metadata={"vocabulary": knows}, **{name: getattr(pipe, name) for name in PARTS_OF["v2"]})
    quick.sampling = quick.sampling.updated(width=64, height=64, prior_steps=1, prior_guidance=1.0, decoder_steps=1)
    monkeypatch.setattr(WuerstchenPipeline, "load", lambda source: v1 if source == "demo-v1" else quick)
    monkeypatch.setattr(remake, "ROOT", tmp_path)
    monkeypatch.setattr(remake, "DEMO", tmp_path)
    monkeypatch.setattr(remake, "SHEET", tmp_path / "docs" / "sheet.jpg")
    monkeypatch.setattr(edits, "SHEET", tmp_path / "docs" / "edits.jpg")
    monkeypatch.setattr(remake, "EVALUATION", tmp_path / "evaluation.json")
    monkeypatch.setattr(remake, "EVALUATION_V1", tmp_path / "evaluation_v1.json")
    fewer = NUMBERS | {"another_thing": NUMBERS["thing"]}
    monkeypatch.setattr(remake, "evaluate", lambda pipe: fewer if pipe is v1 else NUMBERS)
    few = DemoDataset({"canvas": 64, "things": 2}, held_out=True)
    monkeypatch.setattr(remake, "DemoDataset", lambda held_out: few)
    trained: list[Path] = []
    monkeypatch.setattr(lora, "remake", trained.append)
    monkeypatch.setattr(curves, "PLOT", tmp_path / "docs" / "curves.png")
    remake.main()
    assert Image.open(tmp_path / "docs" / "sheet.jpg").size == (1536, 4 * 128 + 192 + 128)
    assert Image.open(tmp_path / "docs" / "edits.jpg").size == (768, 384)
    assert Image.open(tmp_path / "docs" / "curves.png").width == 1080
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
