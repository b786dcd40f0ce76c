"""Training on image files, from a folder and from shards."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.picture_folders import examples, shard, write_folder
from helpers.tiny_stages import (
    STAGES,
    assert_equal_states,
    checkpoint,
    config_path,
    ema_of,
    input_overrides,
    log_rows,
    read_log,
    write_configs,
)
from PIL import Image

from wuerstchen_core.training.data.files import FileDataset
from wuerstchen_core.training.rng import StepRandom
from wuerstchen_core.training.run import run
from wuerstchen_core.training.stages.decoder import DecoderStage

SQUARES, WIDE = range(0, 12), range(20, 26)
CHANGES = ["data.workers=0", "train.sheet_every=2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve squares of 64 pixels and six images of 128x64, with captions."""
    root = tmp_path_factory.mktemp("pictures")
    return write_folder(root, {**examples(SQUARES), **examples(WIDE, 128, 64)})


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Path:
    """The tiny configurations with the folder's squares as data."""
    root = tmp_path_factory.mktemp("configs")
    write_configs(root, root / "run")
    for path in root.glob("*.toml"):
        own = f'source = "{folder.as_posix()}"\nsize = 64\nmultiple = 64'
        path.write_text(path.read_text("utf-8").replace("canvas = 64\nthings = 2", own), encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def trained(configs: Path) -> Path:
    """The run folder of all stages."""
    for stage in STAGES:
        run(stage, config_path(configs, stage), CHANGES)
    return configs / "run"


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_trains_on_a_folder(trained: Path, stage: str) -> None:
    rows = read_log(trained / stage)
    assert [row["step"] for row in rows] == [2, 4] and all(row["loss"] > 0 for row in rows)
    assert checkpoint(trained / stage)["data"]["position"] == 4
    with Image.open(trained / stage / "sheet-000004.png") as grid:
        assert grid.getpixel((64, 64))[1:] == (100, 200)  # the images come first


def test_a_run_on_several_sizes_resumes_exactly(
    configs: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The batches, squares and wide images, are those of an uninterrupted run from the last checkpoint on."""
    changes = [
        *CHANGES,
        *input_overrides(trained),
        "data.buckets=[[64, 64], [128, 64]]",
        "train.batch=3",
        "train.steps=6",
    ]
    seen: list[tuple[int, ...]] = []
    loss = DecoderStage.loss

    def recorded(self: Any, net: Any, *batch: Any) -> Any:
        seen.append(tuple(batch[1].shape[-2:]))
        if len(seen) == stop:
            raise KeyboardInterrupt
        return loss(self, net, *batch)

    monkeypatch.setattr(DecoderStage, "loss", recorded)
    stop = 0
    run("decoder", config_path(configs, "decoder"), [*changes, f"run='{tmp_path / 'whole'}'"])
    whole = list(seen)
    assert set(whole) == {(16, 16), (16, 32)}
    stop = len(seen) + 4
    with pytest.raises(KeyboardInterrupt):
        run("decoder", config_path(configs, "decoder"), [*changes, f"run='{tmp_path / 'stopped'}'"])
    run("decoder", config_path(configs, "decoder"), [*changes, f"run='{tmp_path / 'stopped'}'"])
    assert seen[6:9] == whole[:3] and seen[10:] == whole[2:]  # from the checkpoint of step 2
    assert log_rows(tmp_path / "stopped" / "decoder") == log_rows(tmp_path / "whole" / "decoder")
    assert_equal_states(ema_of(tmp_path / "stopped" / "decoder"), ema_of(tmp_path / "whole" / "decoder"))


def test_resuming_with_other_images_is_reported(
    configs: Path, trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    changes = [*CHANGES, *input_overrides(trained), f"run='{tmp_path}'", "train.sheet_every=1000"]
    run("prior", config_path(configs, "prior"), changes)
    root = write_folder(tmp_path / "other", examples(range(30, 36)))
    with caplog.at_level(logging.WARNING):
        run("prior", config_path(configs, "prior"), [*changes, "train.steps=6", f"data.source='{root}'"])
    assert "have changed" in caplog.text
    assert checkpoint(tmp_path / "prior")["step"] == 6


def test_a_file_dataset_reads_images_and_captions_and_drops_captions(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(shard(examples(range(8))))
    dataset = FileDataset({"source": str(tmp_path / "a.tar"), "size": 64, "multiple": 64, "workers": 0})
    dataset.start_reading(0, "", batch=8, seed=0, cache=tmp_path, rank=0, world=1)
    picked, rng = dataset.sample_batch(StepRandom(0, 0, 8)), StepRandom(0, 0, 8)
    reds = (dataset.images(picked)[:, 0, 0, 0] * 255).round().int().tolist()
    assert dataset.captions(picked, StepRandom(0, 0, 8)) == [f"picture {red}" for red in reds]
    assert sorted(reds) == list(range(8)) and dataset.captions(picked, rng, drop=1.0) == [""] * 8
    assert torch.equal(dataset.map_images("twice", lambda images: images * 2)(picked), dataset.images(picked) * 2)
    preview = dataset.preview_images()
    assert preview is not None and len(preview) == 8 and preview.texts == [f"picture {i}" for i in range(8)]
