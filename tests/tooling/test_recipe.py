"""The recipe of the shipped model: metadata, training curves, and what is regenerated from its weights."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny_model import write_tiny_bundle
from PIL import Image

from tools.demo import build, curves, edits, lora, remake, second_eye, steps
from wuerstchen_core import WuerstchenPipeline
from wuerstchen_core.checkpoints import PARTS_OF
from wuerstchen_core.demo.vocabulary import (
    COLOURS,
    LAYOUTS,
    SHAPES,
    SIMPLE,
    THINGS,
    TRAINED_THINGS,
    held_out,
    known_words,
)
from wuerstchen_core.training.data.demo import DemoDataConfig, DemoDataset

pytest.importorskip("resvg_py", reason="drawing needs resvg-py")


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> WuerstchenPipeline:
    bundle = write_tiny_bundle(tmp_path_factory.mktemp("tiny") / "tiny.safetensors")
    return WuerstchenPipeline.load(bundle, device="cpu", dtype="fp32")


def test_a_bundle_lists_what_its_prior_was_trained_on() -> None:
    v1, v2 = (build.data_config(build.RECIPE / name) for name in ("prior_v1.toml", "prior.toml"))
    assert v1 == DemoDataConfig(things=12) and v2.layouts == LAYOUTS and v2.shapes == tuple(SHAPES)
    assert build.vocabulary(v1) == {
        "words": known_words(THINGS[:12], SIMPLE),
        "things": [thing.name for thing in THINGS[:12]],
        "colours": list(COLOURS),
        "sizes": ["large", "small"],
        "layouts": SIMPLE,
        "shapes": ("square",),
        "larger": (),
    }
    full = build.vocabulary(v2)
    assert full["words"] == known_words(THINGS[:TRAINED_THINGS]) and len(full["things"]) == TRAINED_THINGS >= 128
    assert full["layouts"] == LAYOUTS and full["shapes"] == tuple(SHAPES) and 512 in full["larger"]
    assert "corner" in full["words"] and "corner" not in build.vocabulary(v1)["words"]


def test_factors_of_a_linear_map_are_found() -> None:
    latents = torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    factors, bias = torch.linspace(-0.3, 0.4, 12).view(4, 3), torch.tensor([0.1, -0.2, 0.05])
    colours = torch.einsum("nchw,cd->ndhw", latents, factors) + bias[:, None, None]
    images = ((colours + 1) / 2).repeat_interleave(4, 2).repeat_interleave(4, 3)
    fitted = remake.fit_factors(latents, images)
    assert np.abs(np.array(fitted["factors"]) - factors.numpy()).max() < 1e-4
    assert np.abs(np.array(fitted["bias"]) - bias.numpy()).max() < 1e-4


def test_curves_average_a_hundred_steps() -> None:
    rows = [{"step": step, "loss": float(step > 100)} for step in (50, 100, 150, 200, 230)]
    assert curves.means(rows) == ([50.0, 150.0, 250.0], [0.0, 1.0, 1.0])


def test_the_curve_of_a_second_training_continues_the_first(tmp_path: Path) -> None:
    for name, counts in (("decoder", (20, 40)), ("decoder_again", (20,)), ("vqgan", (20,))):
        rows = [{"step": step, "seconds": step / 10, "loss": 1.0} for step in counts]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    points = [(row["step"], row["seconds"]) for row in curves.joined_log(tmp_path, "decoder")]
    assert points == [(20, 2.0), (40, 4.0), (60, 6.0)]
    assert curves.joined_log(tmp_path, "vqgan") == [{"step": 20, "seconds": 2.0, "loss": 1.0}]


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


def test_the_table_of_a_model_with_other_positions_shapes_and_pairs() -> None:
    part = NUMBERS["thing"]
    more = {"by_place": {"top left": part}, "by_shape": {"portrait": part}, "pairs": {"both": part, "one": part}}
    more |= {"own_colour": part, "by_side": {"512": part}, "trios": {"all": part}}
    more["second_eye"] = {"stage_a": {"nearest": part, "near": part}}
    rows, simple = table_rows({**NUMBERS, **more}), table_rows(NUMBERS)
    assert [row for row in rows if row not in simple] == [
        [name, "96.5 %", "95.0 to 97.6 %", "696"]
        for name in (
            "right thing, nearly of its background's colour",
            "right thing at its position, top left",
            "right thing, complete and alone, portrait",
            "right thing, complete and alone, 512x512",
            "two things, both right",
            "two things, one right",
            "three things, all right",
            "right large thing after Stage A alone, by the second eye",
            "right large thing after Stage A alone, by the second eye, among five",
        )
    ]


def test_the_table_of_a_simple_model() -> None:
    assert table_rows(NUMBERS) == [
        ["right thing", "96.5 %", "95.0 to 97.6 %", "696"],
        ["right thing, large", "97.0 %", "94.6 to 98.3 %", "348"],
        ["another thing instead", "1.0 %", "0.5 to 2.1 %", "696"],
        ["right background", "99.9 %", "99.2 to 100.0 %", "696"],
        ["right thing after 42.67x compression", "98.3 %", "95.7 to 99.3 %", "232"],
        ["PSNR after compression", "26.1 dB", "worst 21.3 dB", "232"],
    ]


def test_the_page_has_the_tables_of_the_shipped_models() -> None:
    page = remake.PAGE.read_text(encoding="utf-8")
    for marks, evaluation in ((remake.MARKS, remake.EVALUATION), (remake.MARKS_V1, remake.EVALUATION_V1)):
        table = remake.number_table(json.loads(evaluation.read_text(encoding="utf-8")))
        assert remake.replace_between(page, marks, table) == page
        replaced = remake.replace_between(page, marks, "TABLE")
        assert f"{marks[0]}\nTABLE\n{marks[1]}" in replaced and table not in replaced


@pytest.mark.parametrize("broken", ["no marks", "{1} {0}", "{0} {0} {1}"])
def test_a_page_without_marks_is_refused(broken: str) -> None:
    with pytest.raises(ValueError, match=remake.MARKS[0]):
        remake.replace_between(broken.format(*remake.MARKS), remake.MARKS, "TABLE")


def test_one_command_regenerates_everything_that_depends_on_the_weights(
    pipe: WuerstchenPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = "before\n{0[0]}\n{2}{0[1]}\nbetween\n{1[0]}\n{3}{1[1]}\nafter\n"
    marks = remake.MARKS, remake.MARKS_V1
    (tmp_path / "demo.md").write_text(page.format(*marks, "old\n", ""))
    v1 = WuerstchenPipeline()
    vocabulary = build.vocabulary(DemoDataConfig(things=12, layouts=LAYOUTS, shapes=tuple(SHAPES)))
    networks = {name: getattr(pipe, name) for name in PARTS_OF["v2"]}
    quick = WuerstchenPipeline(metadata={"vocabulary": vocabulary}, **networks)
    quick.sampling = quick.sampling.updated(width=64, height=64, prior_steps=1, prior_guidance=1.0, decoder_steps=1)
    monkeypatch.setattr(WuerstchenPipeline, "load", lambda source: v1 if source == "demo-v1" else quick)
    monkeypatch.setattr(remake, "PAGE", tmp_path / "demo.md")
    monkeypatch.setattr(remake, "DEMO", tmp_path)
    monkeypatch.setattr(remake, "GRID", tmp_path / "grid.webp")
    monkeypatch.setattr(remake, "RANDOM_GRID", tmp_path / "random.webp")
    monkeypatch.setattr(edits, "GRID", tmp_path / "edits.webp")
    monkeypatch.setattr(remake, "EVALUATION", tmp_path / "evaluation.json")
    monkeypatch.setattr(remake, "EVALUATION_V1", tmp_path / "evaluation_v1.json")
    v1_numbers = NUMBERS | {"another_thing": NUMBERS["thing"]}
    monkeypatch.setattr(second_eye, "load_network", lambda: None)
    monkeypatch.setattr(remake, "evaluate", lambda pipe, second_eye: v1_numbers if pipe is v1 else NUMBERS)
    few = DemoDataset({"canvas": 64, "things": 2}, held_out=True)
    monkeypatch.setattr(remake, "DemoDataset", lambda held_out: few)
    trained: list[str] = []
    monkeypatch.setattr(lora, "remake", lambda: trained.append("lora"))
    monkeypatch.setattr(curves, "PLOT", tmp_path / "curves.png")
    monkeypatch.setattr(steps, "DOCS", tmp_path)
    remake.main()
    assert Image.open(tmp_path / "grid.webp").size == (1536, 6 * 128 + 192 + 128 + 256 + 128)
    assert Image.open(tmp_path / "random.webp").size == (1024, 8 * (128 + 40))
    assert Image.open(tmp_path / "edits.webp").size == (768, 384)
    assert Image.open(tmp_path / "curves.png").width == 1080
    assert trained == ["lora"] and (tmp_path / "steps.md").exists()
    factors = json.loads((tmp_path / "preview_factors.json").read_text())
    assert {name: np.shape(value["factors"]) for name, value in factors.items()} == {
        "prior": (16, 3),
        "decoder": (4, 3),
    }
    assert all(np.shape(value["bias"]) == (3,) for value in factors.values())
    assert json.loads((tmp_path / "evaluation.json").read_text()) == NUMBERS
    assert json.loads((tmp_path / "evaluation_v1.json").read_text()) == v1_numbers
    tables = (f"{remake.number_table(numbers)}\n" for numbers in (NUMBERS, v1_numbers))
    assert (tmp_path / "demo.md").read_text() == page.format(*marks, *tables)


def test_random_scenes_are_held_out_and_of_all_layouts() -> None:
    metadata = {"vocabulary": build.vocabulary(DemoDataConfig(layouts=LAYOUTS))}
    found = remake.random_scenes(metadata)
    assert len(found) == 64 and all(held_out(scene) and scene.shape == 0 for scene in found)
    assert {scene.layout for scene in found} == {*LAYOUTS} and found == remake.random_scenes(metadata)


def test_a_page_without_marks_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "demo.md").write_text("nothing here")
    monkeypatch.setattr(remake, "PAGE", tmp_path / "demo.md")
    monkeypatch.setattr(WuerstchenPipeline, "load", lambda source: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=remake.MARKS[0]):
        remake.main()


def test_missing_packages_are_named_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WuerstchenPipeline, "load", lambda source: pytest.fail("loaded"))
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(ValueError, match="efficientnet_lite_pytorch"):
        remake.main()
