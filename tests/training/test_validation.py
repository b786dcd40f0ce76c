"""The validation loss: on images that are never trained on, at the same times and noises in every run."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.picture_folders import examples, write_folder
from helpers.tiny_model import write_tiny_bundle
from helpers.tiny_stages import assert_equal_states, checkpoint, config_path, read_log, write_configs

from wuerstchen_core.training import monitor, validation
from wuerstchen_core.training.config import INPUTS
from wuerstchen_core.training.data.files import FileDataset
from wuerstchen_core.training.data.held_out import ValidationConfig, hold_out
from wuerstchen_core.training.data.source import RECORD_FIELDS
from wuerstchen_core.training.rng import StepRandom
from wuerstchen_core.training.run import STAGES, run
from wuerstchen_core.training.validation import rise, validation_loss

COUNT = 12
DATA = {"size": 64, "multiple": 64, "workers": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("pictures"), examples(range(COUNT)))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny.safetensors")


def changes(folder: Path, bundle: Path, run_folder: Path) -> list[str]:
    inputs = [f"inputs.{stage}='{bundle}'" for stage in ("encoder", "text")]
    data = [f"data.{key}={value}" for key, value in DATA.items()]
    return [
        *inputs, *data, f"data.source='{folder}'", f"start='{bundle}'", "validation.fraction=0.25",
        "validation.every=2", f"run='{run_folder}'", "train.sheet_every=1000", "train.muon_lr=0.0",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("config")
    write_configs(root, root)
    path = config_path(root, "prior")
    text = path.read_text("utf-8").replace("canvas = 64\nthings = 2", "").partition("[model]")[0]
    path.write_text(text, encoding="utf-8")
    return path


def test_an_image_is_held_out_with_all_its_captions() -> None:
    records = np.zeros(40, RECORD_FIELDS)
    records["line"] = np.tile([0, 1], 20)
    buckets = np.repeat([1, 0], 20)
    held = hold_out(ValidationConfig(0.2), records, buckets, np.ones(40, dtype=bool))
    assert held.sum() == 8 and np.array_equal(held[::2], held[1::2])
    cached = np.argsort(buckets, kind="stable")  # a cache has the images by bucket
    assert np.array_equal(hold_out(ValidationConfig(0.2), records[cached], buckets[cached], held >= 0), held[cached])
    used = np.arange(40) < 4
    assert hold_out(ValidationConfig(0.01), records, buckets, used).sum() == 2
    assert hold_out(ValidationConfig(0.9, most=3), records, buckets, held >= 0).sum() == 6
    assert not hold_out(ValidationConfig(), records, buckets, used).any()


def test_held_out_images_are_never_trained_on(folder: Path, tmp_path: Path) -> None:
    dataset = FileDataset({"source": str(folder), **DATA}, validation=ValidationConfig(0.25))
    dataset.start_reading(0, "", batch=4, seed=0, cache=tmp_path, rank=0, world=1)

    def reds(batch: Any) -> list[int]:
        return (dataset.images(batch)[:, 0, 0, 0] * 255).round().int().tolist()

    trained = {red for step in range(9) for red in reds(dataset.sample_batch(StepRandom(0, step, 4)))}
    held = [(first, reds(batch), size) for first, batch, size in dataset.held_out_batches(2)]
    assert [(first, size) for first, _, size in held] == [(0, 2), (2, 1)] and dataset.held_out == 3
    shown = [red for _, some, _ in held for red in some]
    assert trained | set(shown) == set(range(COUNT)) and not trained & set(shown)


def test_unreadable_held_out_images_are_named(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "pictures", examples(range(2)))
    dataset = FileDataset({"source": str(root), **DATA}, validation=ValidationConfig(0.5))
    dataset.start_reading(0, "", batch=1, seed=0, cache=tmp_path, rank=0, world=1)
    for path in root.glob("*.png"):
        path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"\[validation\].*\.png"):
        list(dataset.held_out_batches(2))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.long] if "distill" in name else []) for name in STAGES]
)
def test_the_loss_depends_on_neither_batches_nor_training_settings(
    name: str, folder: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name.startswith("token-decoder"):
        bundle = write_tiny_bundle(tmp_path / "v1.safetensors", release="v1")
    monkeypatch.setattr(validation, "DRAWS", 6)
    config: dict[str, Any] = {
        "run": str(tmp_path), "inputs": dict.fromkeys(INPUTS, str(bundle)),
        "data": {"source": str(folder), **DATA}, "validation": {"fraction": 0.25},
    }  # fmt: skip
    config |= {"start": str(bundle)} if "start" in STAGES[name].tables else {}
    config |= {"embedding": {"name": "thing", "init": "apple"}} if "embedding" in STAGES[name].tables else {}
    config |= {"control": {"hints": "outline"}} if "control" in STAGES[name].tables else {}
    config |= {"distill": {"guidance": 2.0}} if "distill" in STAGES[name].tables else {}
    config |= {"vqgan": {"crop": 16, "margin": 8}} if name == "vqgan" else {}
    losses = []
    for noise in ({}, {"text_drop": 1.0, "focus": 3.0}):
        torch.manual_seed(0)  # for the networks that only training needs
        stage = STAGES[name](config | ({"noise": noise} if "noise" in STAGES[name].tables else {}))
        stage.dataset.start_reading(0, "", batch=4, seed=len(losses), cache=tmp_path, rank=0, world=1)
        losses.append(validation_loss(stage, stage.net.eval(), nullcontext))
        assert losses[-1] == validation_loss(stage, stage.net, nullcontext) > 0
    assert losses[0] == losses[1]
    if name != "text":  # whose loss compares the captions of a batch
        monkeypatch.setattr(validation, "BATCH", 2)
        assert validation_loss(stage, stage.net, nullcontext) == pytest.approx(losses[0], rel=1e-4)


def test_validation_is_logged_and_resumed_and_changes_no_weights(
    config: Path, folder: Path, bundle: Path, tmp_path: Path
) -> None:
    run("prior", config, [*changes(folder, bundle, tmp_path / "a"), "train.steps=6"])
    rows = read_log(tmp_path / "a" / "prior")
    losses = {row["step"]: row["validation"] for row in rows if "validation" in row}
    assert list(losses) == [0, 2, 4, 6] and len(set(losses.values())) == 4
    other = [
        *changes(folder, bundle, tmp_path / "b"),
        "train.steps=6",
        "validation.every=1000",
        "train.save_every=1000",
    ]
    run("prior", config, other)
    assert_equal_states(checkpoint(tmp_path / "a" / "prior")["net"], checkpoint(tmp_path / "b" / "prior")["net"])
    assert [row["validation"] for row in read_log(tmp_path / "b" / "prior") if "validation" in row] == [
        losses[0], losses[6]
    ]  # fmt: skip
    (tmp_path / "a" / "prior" / "checkpoint-00000006.pt").unlink()
    run("prior", config, [*changes(folder, bundle, tmp_path / "a"), "train.steps=6"])
    again = read_log(tmp_path / "a" / "prior")
    assert [{**row, "seconds": 0} for row in again] == [{**row, "seconds": 0} for row in rows]
    for path in (tmp_path / "a" / "prior").glob("*.pt"):  # killed before its first checkpoint
        path.unlink()
    run("prior", config, [*changes(folder, bundle, tmp_path / "a"), "train.steps=2"])
    assert [row["step"] for row in read_log(tmp_path / "a" / "prior")] == [0, 2, 2]


def test_a_rising_loss_is_reported_once(
    config: Path, folder: Path, bundle: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    losses = iter([0.5, 0.4, 0.3, 0.31, 0.32, 0.33, 0.34])
    monkeypatch.setattr(monitor, "validation_loss", lambda *_: next(losses))
    with caplog.at_level(logging.WARNING):
        run("prior", config, [*changes(folder, bundle, tmp_path), "train.steps=12"])
    warnings = [record.getMessage() for record in caplog.records if "validation loss" in record.getMessage()]
    assert len(warnings) == 1 and "0.3000 at step 4" in warnings[0] and "0.3300 at step 10" in warnings[0]
    assert next(losses, None) is None


def test_a_small_rise_or_a_lower_loss_gives_no_warning() -> None:
    assert not rise([(0, 0.5)])
    assert not rise(list(enumerate([0.5, 0.501, 0.502, 0.503, 0.504])))
    assert not rise(list(enumerate([0.5, 0.6, 0.7, 0.4])))
    assert rise(list(enumerate([0.5, 0.6, 0.7, 0.6])))


@pytest.mark.parametrize(
    ("data", "facts"),
    [({}, "source"), ({"source": "https://example.com/a.tar"}, "stream")],
)
def test_validation_needs_images_that_can_be_held_out(data: dict[str, Any], facts: str, tmp_path: Path) -> None:
    config = {"run": str(tmp_path), "data": data, "model": {}, "validation": {"fraction": 0.1}, "vqgan": {"crop": 16}}
    with pytest.raises(ValueError, match=rf"\[validation\].*{facts}"):
        STAGES["vqgan"](config).dataset.start_reading(0, "", batch=1, seed=0, cache=tmp_path, rank=0, world=1)
