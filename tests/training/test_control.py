"""Training of ControlNets in a tiny size."""

from __future__ import annotations

import json
import logging
import tarfile
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.lora_training import write_config
from helpers.networks import CONTROL
from helpers.tiny_stages import assert_equal_states, checkpoint, ema_of, log_rows
from PIL import Image

from wuerstchen_core import WuerstchenPipeline
from wuerstchen_core.checkpoints import describe, load_control_net, load_prior, save_bundle
from wuerstchen_core.checkpoints.release import prior_values
from wuerstchen_core.common.dataclass_config import from_table
from wuerstchen_core.models.control_net import ControlNet
from wuerstchen_core.training.config import read_config
from wuerstchen_core.training.data import loading
from wuerstchen_core.training.export import export_run
from wuerstchen_core.training.report import comfyui_use, generate_arguments
from wuerstchen_core.training.rng import StepRandom
from wuerstchen_core.training.run import run
from wuerstchen_core.training.stages.control import ControlConfig, ControlStage, HintMaker, start_control_net

pytest.importorskip("resvg_py", reason="drawing needs resvg-py")

CONFIG = """
run = "overridden"
[data]
canvas = 64
things = 2
[control]
hints = "outline"
widths = [8, 8, 8, 16]
repeats = [1, 1, 1, 1]
contours = 0.5
[noise]
weight = "v"
stratified = true
[train]
steps = 4
batch = 4
lr = 1e-2
warmup = 1
ema = 0.5
log_every = 2
save_every = 2
sheet_every = 1000
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, bundle: Path) -> Path:
    return write_config(tmp_path_factory.mktemp("control"), bundle, CONFIG)


@pytest.fixture(scope="module")
def trained(config: Path) -> Path:
    return run("control", config, [f"run='{config.parent}'"])


def stage(config: Path, *changes: str) -> ControlStage:
    return ControlStage(read_config(config, [f"run='{config.parent}'", *changes]))


def test_only_the_control_net_is_trained_and_its_file_names_its_prior(
    trained: Path, config: Path, bundle: Path
) -> None:
    saved = checkpoint(trained.parent)
    assert all(key.startswith("control_net.") for key in saved["net"])
    assert saved["net"].keys() == saved["average"].keys()
    net = load_control_net(trained)
    assert replace(net.params, prior_values=()) == replace(CONTROL, widths=(8, 8, 8, 16))
    assert_equal_states({f"control_net.{key}": x for key, x in net.state_dict().items()}, saved["average"])
    assert all(projection.weight.any() for projection in net.projections.values())
    assert net.params.prior_values == prior_values(load_prior(bundle))
    [part] = describe(trained).parts
    assert part.node == "Würstchen ControlNet Loader" and describe(trained).licence == "MIT"
    arguments = generate_arguments(stage(config), read_config(config, []), trained, "a cat")
    assert arguments[-3:] == ["--control", str(trained), "hint.png"]
    assert "Apply ControlNet" in comfyui_use(stage(config))


@pytest.mark.long
def test_a_stopped_run_resumes_exactly(trained: Path, config: Path, tmp_path: Path) -> None:
    for steps in (2, 4):
        run("control", config, [f"run='{tmp_path}'", f"train.steps={steps}", "train.decay=0.0"])
    whole = run("control", config, [f"run='{tmp_path / 'whole'}'", "train.decay=0.0"])
    assert_equal_states(ema_of(tmp_path / "control"), ema_of(whole.parent))
    assert log_rows(tmp_path / "control") == log_rows(whole.parent)


def test_it_learns(config: Path) -> None:
    """On one batch: the frozen prior's loss falls by what the ControlNet adds."""
    trainer = stage(config)
    batch = trainer.batch(0, StepRandom(0, 0, 4))
    trained = [p for p in trainer.net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-2)
    losses = []
    for _ in range(10):
        loss = trainer.loss(trainer.net, *batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0], losses
    assert len(trained) == len(trainer.net.control_net.state_dict())


@pytest.mark.parametrize(
    "kind", ["outline", *(pytest.param(x, marks=pytest.mark.long) for x in ("silhouette", "colours", "boxes"))]
)
def test_hints_of_every_kind(config: Path, kind: str) -> None:
    trainer = stage(config, f"control.hints='{kind}'", "control.contours=0.0", "data.layouts=['pair']", "data.most=4")
    hints = HintMaker(trainer.control, trainer.dataset)(trainer.dataset, torch.arange(2))
    assert tuple(hints.shape) == (2, 3, 64, 64) and 0 <= float(hints.min()) < float(hints.max()) <= 1
    half = HintMaker(replace(trainer.control, drop=0.5), trainer.dataset)
    dropped = half(trainer.dataset, torch.zeros(64, dtype=torch.long), StepRandom(0, 0, 64))
    black = (dropped.flatten(1).amax(1) == 0).float().mean()
    assert 0.25 < float(black) < 0.75
    assert trainer.net.control_net.params.hints == kind


def test_outlines_vary_in_width_and_in_what_they_show(config: Path) -> None:
    trainer = stage(config, "control.drop=0.0", "control.line_widths=[1.0, 6.0]")
    hints = trainer.hints(trainer.dataset, torch.zeros(12, dtype=torch.long), StepRandom(0, 0, 12))
    assert len({float(x.sum()) for x in hints}) > 4
    again = trainer.hints(trainer.dataset, torch.zeros(12, dtype=torch.long), StepRandom(0, 0, 12))
    assert torch.equal(hints, again)


@pytest.mark.long
def test_sample_grids_show_the_hint_beside_the_picture(config: Path, tmp_path: Path) -> None:
    file = run("control", config, [f"run='{tmp_path}'", "train.steps=2", "train.sheet_every=2", "data.things=3"])
    with Image.open(file.parent / "sheet-000002.png") as sheet:
        rows = sheet.height // 128
    assert rows == 3
    trainer = stage(config, "data.things=3")
    images = trainer.dataset.preview_images()
    assert images is not None
    originals, hints, samples = trainer.samples(trainer.net, images)
    assert originals.shape == hints.shape == samples.shape
    assert set(hints.unique().tolist()) == {0.0, 1.0}


def test_the_trained_file_steers_as_in_training(trained: Path, bundle: Path, tmp_path: Path) -> None:
    pipe = WuerstchenPipeline.load(bundle, device="cpu", dtype="fp32")
    Image.new("RGB", (128, 64), "white").save(tmp_path / "hint.png")
    text, _ = pipe.encode_text(["a red apple"])
    steered, plain = (
        pipe.sample_prior(text, pipe.sampling, control=x) for x in ((trained, tmp_path / "hint.png"), None)
    )
    assert not torch.equal(steered, plain)


@pytest.mark.long
def test_a_run_exports(trained: Path, tmp_path: Path) -> None:
    folder = export_run(trained.parent, [], tmp_path / "export")
    assert load_control_net(folder / "control.safetensors").params.hints == "outline"
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "models/controlnet" in card and "Apply ControlNet" in card and "in place of" not in card


def test_training_goes_on_from_a_file(trained: Path, config: Path, bundle: Path, tmp_path: Path) -> None:
    trainer = stage(config, f"control.start='{trained}'")
    assert_equal_states(trainer.net.control_net.state_dict(), load_control_net(trained).state_dict())
    assert trainer.bases[-1] == str(trained)
    other = tmp_path / "deep.safetensors"
    save_bundle(other, {"control_net": ControlNet(replace(CONTROL, prior_depth=3))}, {})
    for change, named in (
        (f"control.start='{other}'", "depth 3"), ("noise.slow_times=true", "slow_times"),
        ("train.muon_lr=0.1", "muon_lr"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=named):
            stage(config, change)
    with pytest.raises(ValueError, match="outline"):
        stage(config, f"control.start='{trained}'", "control.hints='silhouette'", "control.contours=0.0")
    prior = load_prior(bundle)
    for key, sizes in (("blocks", (1,)), ("widths", (8, 8, 8, 8)), ("repeats", (1, 1, 1, 2))):
        with pytest.raises(ValueError, match=rf"control\.safetensors.*{key}"):
            start_control_net(replace(trainer.control, **{key: sizes}), prior)
        assert start_control_net(ControlConfig("outline", start=str(trained)), prior).params.widths == (8, 8, 8, 16)


@pytest.mark.parametrize(
    "table",
    [
        {}, {"hints": "sketch"}, {"hints": "boxes", "contours": 0.5}, {"hints": "outline", "line_widths": [3.0, 1.0]},
        {"hints": "silhouette", "line_widths": [1.0, 2.0]}, {"hints": "outline", "drop": 2.0},
    ],
    ids=str,
)  # fmt: skip
def test_tables_that_make_no_sense(table: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="control"):
        from_table(ControlConfig, table, "control")


def test_boxes_are_for_the_demos_drawings(config: Path, tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "pictures" / "a.png")
    table = f"data={{source='{tmp_path / 'pictures'}', size=64, multiple=64}}"
    with pytest.raises(ValueError, match="boxes"):
        stage(config, table, "control.hints='boxes'", "control.contours=0.0")


@pytest.fixture
def given(tmp_path: Path) -> Path:
    """Pictures of two halves, whose hints are grey in the same halves, in each way of naming them."""
    folder = tmp_path / "pictures"
    (folder / "controls").mkdir(parents=True)
    for number, hint in enumerate(("0.control", "1_depth", "controls/2", "other")):
        for name, colour in ((str(number), (255, 0, 0)), (hint, (100 + number, 0, 0))):
            image = Image.new("RGB", (128, 128))
            image.paste(colour, (64, 0, 128, 128))
            image.save(folder / f"{name}.png")
        (folder / f"{number}.txt").write_text("a red apple")
    rows = [{"file_name": "3.png", "conditioning_image": "other.png", "text": "a red apple"}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def given_stage(config: Path, folder: Path, *changes: str) -> ControlStage:
    data = f"data={{source='{folder}', size=64, multiple=64, flip=0.5, workers=0}}"
    return stage(config, data, "control.hints='given'", "control.contours=0.0", "control.drop=0.0", *changes)


def test_hints_that_are_given_follow_crops_and_flips(config: Path, given: Path, tmp_path: Path) -> None:
    trainer = given_stage(config, given)
    trainer.dataset.start_reading(0, "", batch=4, seed=0, cache=tmp_path, rank=0, world=1)
    assert trainer.dataset.examples == 4
    levels, sides = set(), set()
    for step in range(3):
        picked = trainer.dataset.sample_batch(StepRandom(0, step, 4))
        images, hints = trainer.dataset.images(picked), trainer.hints(trainer.dataset, picked, StepRandom(0, step, 4))
        assert hints.shape == images.shape == (4, 3, 64, 64)
        assert torch.equal(hints > 0.2, images > 0.5)
        levels |= {round(float(x[0, 32].sort().values[-16]) * 255) for x in hints}
        sides |= {bool(x) for x in images[:, 0, 0, 0] > 0}
    assert levels == {100, 101, 102, 103} and sides == {True, False}
    preview = trainer.dataset.preview_images()
    assert preview is not None
    [hints] = trainer.sample_inputs(preview, torch.arange(2))
    assert torch.equal(hints > 0.2, preview.images(slice(2)) > 0.5)


def test_large_hints_are_cropped_in_turn(config: Path, given: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Also where the picture itself is smaller."""
    trainer = given_stage(config, given, "data.bad_share=0.0")
    for path in (given / "0.control.png", given / "1_depth.png", given / "controls" / "2.png", given / "other.png"):
        Image.new("RGB", (256, 256)).save(path)
    turns: list[int] = []
    monkeypatch.setattr(loading, "turn", lambda pixels: turns.append(pixels) or nullcontext())
    trainer.dataset.start_reading(0, "", batch=2, seed=0, cache=tmp_path, rank=0, world=1)
    trainer.dataset.sample_batch(StepRandom(0, 0, 2))
    assert set(turns) == {256 * 256}


def test_hints_that_are_missing_or_cannot_be_given(
    config: Path, given: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    (given / "1_depth.png").unlink()
    Image.new("RGB", (64, 128)).save(given / "0.control.png")
    trainer = given_stage(config, given, "data.bad_share=0.9")
    trainer.dataset.start_reading(0, "", batch=2, seed=0, cache=tmp_path, rank=0, world=1)
    loader: Any = trainer.dataset._loader
    bad = loader[0].bad | loader[1].bad
    assert "control.png" in bad["1.png"] and "hint of 0.png has 64x128" in bad["0.png"]
    assert "3 of 4 images have a hint picture" in caplog.text
    for name in ("0.control.png", "controls/2.png", "other.png"):
        (given / name).unlink()
    (given / "metadata.jsonl").unlink()
    with pytest.raises(ValueError, match="none of 4 images has a hint"):
        trainer.dataset.start_reading(0, "", batch=2, seed=0, cache=tmp_path, rank=0, world=1)
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / "a.tar", "w") as tar:
        tar.add(given / "2.png", "2.png")
    shards = given_stage(config, tmp_path / "tars")
    with pytest.raises(ValueError, match="given"):
        shards.dataset.start_reading(0, "", batch=2, seed=0, cache=tmp_path, rank=0, world=1)
    with pytest.raises(ValueError, match="given"):
        stage(config, "control.hints='given'", "control.contours=0.0")


def test_things_at_random_places_have_boxes(config: Path) -> None:
    changes = ("control.hints='boxes'", "control.contours=0.0", "data.things=4", "data.layouts=['pair']")
    trainer = stage(config, *changes, "data.scattered=4", "data.scattered_share=1.0")
    [dataset] = trainer.dataset.datasets
    picked = torch.arange(len(dataset))
    assert len(dataset) == 4
    images, boxes = dataset.images(picked), dataset.boxes(picked)
    hints = trainer.hints(dataset, picked)
    never_black = HintMaker(replace(trainer.control, drop=1.0), trainer.dataset)
    assert torch.equal(hints, never_black(trainer.dataset, (0, picked), StepRandom(0, 0, 4)))
    assert len({tuple(own) for own in boxes}) == 4
    background = images[:, :, :1, :1]
    for image, own, hint, colour in zip(images, boxes, hints, background, strict=True):
        inside = hint.any(0)
        assert len(own) == 2 and ((image - colour).abs().amax(0)[~inside] < 0.05).all()
        assert (image - colour).abs().amax(0)[inside].mean() > 0.1
        assert not (hint[0].bool() & hint[1].bool()).any()
