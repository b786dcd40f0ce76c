"""All stages in a tiny size."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny_stages import (
    ALL,
    DIFFUSERS,
    STAGES,
    assert_equal_states,
    checkpoint,
    config_path,
    ema_of,
    input_overrides,
    launch,
    log_rows,
    read_log,
)
from PIL import Image
from safetensors.torch import load_file

from wuerstchen_core.checkpoints import read_metadata
from wuerstchen_core.cli.main import main
from wuerstchen_core.training.checkpoint import checkpoints
from wuerstchen_core.training.data.demo import DemoDataset
from wuerstchen_core.training.rng import StepRandom
from wuerstchen_core.training.run import run
from wuerstchen_core.training.sample_grid import sample_grid
from wuerstchen_core.training.stages.token_decoder import code_features
from wuerstchen_core.training.tables import STAGES as CLASSES

pytest.importorskip("resvg_py", reason="drawing needs resvg-py")

ROOT = Path(__file__).parents[2]
DATA = {"data": {"canvas": 64, "things": 2}}
TILE = 128  # pixels in a sample grid
ROWS = {"vqgan": 3, "encoder": 2, "text": 2, "decoder": 2, "token-decoder": 2, "prior": 2}  # of a grid of 8 images


def trained(run_folder: Path, stage: str) -> Path:
    """Returns the folder of a stage."""
    return (run_folder if stage in STAGES else run_folder / "v1") / stage


FROZEN_STAGE_A = ("decoder", "prior", "token-decoder")


@pytest.mark.parametrize("stage", ALL)
def test_a_stage_writes_weights_log_and_samples(run_folder: Path, stage: str) -> None:
    folder = trained(run_folder, stage)
    assert {path.name for path in folder.iterdir()} == {
        "checkpoint-00000002.pt", "checkpoint-00000004.pt", "config.toml", "log.jsonl", "run.html",
        f"{stage}.safetensors", "sheet-000004.png", "starts.jsonl",
        *(["diffusers"] if stage in (*DIFFUSERS, "text") else []),  # transformers has the text encoder
        *(["reconstruction.png"] if stage in FROZEN_STAGE_A else []),
    }  # fmt: skip
    rows = read_log(folder)
    assert [row["step"] for row in rows] == [2, 4]
    assert all(np.isfinite(row["loss"]) and row["loss"] > 0 for row in rows)
    weights = load_file(folder / f"{stage}.safetensors")
    assert weights and all(x.isfinite().all() for x in weights.values())
    assert read_metadata(folder / f"{stage}.safetensors")["training"] == {"step": 4}
    averaged = ema_of(folder)
    for key, value in weights.items():  # the file has the EMA
        assert any(torch.equal(value, x) for k, x in averaged.items() if k.endswith(key.partition(".")[2]))


@pytest.mark.parametrize("stage", ALL)
def test_a_sample_grid_shows_images_and_results(run_folder: Path, stage: str) -> None:
    with Image.open(trained(run_folder, stage) / "sheet-000004.png") as image:
        pixels = np.asarray(image)
    held = DemoDataset(DATA["data"], held_out=True)
    columns = len(held) * TILE
    assert pixels.shape == (ROWS[stage] * TILE, columns, 3)
    truth = np.asarray(sample_grid([held.images(held.evenly_spaced(12))]))
    assert np.array_equal(pixels[:TILE], truth)
    assert truth.std() > 10
    others = pixels[TILE:].reshape(ROWS[stage] - 1, TILE, -1)
    assert all(row.std() > 0 for row in others)
    if stage == "text":  # its results are images that match the captions
        tiles = {pixels[:TILE, i : i + TILE].tobytes() for i in range(0, columns, TILE)}
        assert all(pixels[TILE:, i : i + TILE].tobytes() in tiles for i in range(0, columns, TILE))
    else:
        assert not np.array_equal(others[0], truth.reshape(TILE, -1))


@pytest.mark.parametrize("stage", ALL)
def test_a_stopped_stage_resumes_exactly(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """Same log and EMA bit for bit, although the prior has dropout and the VQGAN initialises random codes at step 2."""
    kind, calls = CLASSES[stage], []
    whole = trained(run_folder, stage)

    def stopped(self: Any, net: Any, *batch: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return loss(self, net, *batch)

    loss = kind.loss
    overrides = [f"run='{tmp_path}'", *input_overrides(whole.parent)]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(kind, "loss", stopped)
        run(stage, config_path(run_folder, stage), overrides)
    assert checkpoint(tmp_path / stage)["step"] == 2
    torch.manual_seed(5)
    assert run(stage, config_path(run_folder, stage), overrides) == tmp_path / stage / f"{stage}.safetensors"
    assert log_rows(tmp_path / stage) == log_rows(whole)
    assert_equal_states(ema_of(tmp_path / stage), ema_of(whole))


@pytest.mark.long
@pytest.mark.parametrize("stage", ALL)
def test_two_processes_train_a_stage(run_folder: Path, tmp_path: Path, stage: str) -> None:
    """Runs the command under torchrun with half of each batch; the decoders, without batch norm, have equal losses."""
    whole = trained(run_folder, stage)
    changes = [f"run='{tmp_path}'", *input_overrides(whole.parent), "train.batch=2"]
    config = ["--config", str(config_path(run_folder, stage)), *(f"--set={change}" for change in changes)]
    launch("-m", "wuerstchen_core", "train", stage, *config)
    assert {path.name for path in (tmp_path / stage).iterdir()} == {path.name for path in whole.iterdir()}
    assert all(x.isfinite().all() for x in ema_of(tmp_path / stage).values())
    if stage in ("decoder", "token-decoder"):
        one, two = ([row["loss"] for row in read_log(folder)] for folder in (whole, tmp_path / stage))
        assert two == pytest.approx(one, rel=1e-4)


def test_gradient_checkpointing_trains_the_same(run_folder: Path, tmp_path: Path, inputs: list[str]) -> None:
    run("prior", run_folder / "prior.toml", [f"run='{tmp_path}'", *inputs, "train.checkpointing=true"])
    assert log_rows(tmp_path / "prior") == log_rows(run_folder / "prior")
    assert_equal_states(ema_of(tmp_path / "prior"), ema_of(run_folder / "prior"))


@pytest.mark.parametrize("stage", ["decoder", "prior"])
def test_bf16_trains_almost_the_same_with_fp32_weights(
    run_folder: Path, inputs: list[str], tmp_path: Path, stage: str
) -> None:
    run(stage, config_path(run_folder, stage), [f"run='{tmp_path}'", *inputs, "train.precision='bf16'"])
    rounded, exact = ([row["loss"] for row in read_log(folder / stage)] for folder in (tmp_path, run_folder))
    assert rounded == pytest.approx(exact, rel=0.02) and rounded != exact
    assert all(x.dtype == torch.float32 for x in checkpoint(tmp_path / stage)["net"].values())


def test_another_seed_is_another_training(run_folder: Path, inputs: list[str], tmp_path: Path) -> None:
    run("prior", run_folder / "prior.toml", [f"run='{tmp_path}'", *inputs, "train.seed=1"])
    assert log_rows(tmp_path / "prior") != log_rows(run_folder / "prior")


LEARNING = {  # steps, and the largest last loss as a fraction of the first; text takes too long for a test
    "vqgan": (16, 0.5),
    "encoder": (16, 0.7),
    "decoder": (16, 0.9),
    "token-decoder": (24, 0.97),
    "prior": (24, 0.9),
}


@pytest.mark.parametrize("stage", LEARNING)
def test_the_loss_goes_down(run_folder: Path, inputs: list[str], tmp_path: Path, stage: str) -> None:
    steps, fraction = LEARNING[stage]
    rows = 4
    changes = [f"train.steps={steps}", f"train.log_every={steps // rows}", "train.lr=5e-3", "train.batch=8"]
    changes += ["train.save_every=1000", "train.sheet_every=1000", "train.warmup=4", "train.muon_lr=0.0"]
    run(stage, config_path(run_folder, stage), [f"run='{tmp_path}'", *inputs, *changes])
    losses = [row["loss"] for row in read_log(tmp_path / stage)]
    assert len(losses) == rows and losses[-1] < fraction * losses[0], losses


def test_near_codes_start_similar() -> None:
    torch.manual_seed(0)
    codes = torch.tensor([[0.0] * 4, [0.02] * 4, [0.3] * 4, [3.0] * 4])
    products = (features := code_features(codes, 4096, 0.15)) @ features.T
    assert products.diagonal() == pytest.approx([1.0] * 4, abs=0.05)
    assert products[0, 1] > 0.95 > 0.9 > products[0, 2] > products[0, 3] + 0.1


def test_a_token_decoder_needs_all_codes(run_folder: Path, inputs: list[str], tmp_path: Path) -> None:
    wrong = [f"run='{tmp_path}'", *inputs, "model.num_labels=17"]
    with pytest.raises(ValueError, match=r"\[model\] num_labels .*16.*17"):
        run("token-decoder", config_path(run_folder, "token-decoder"), wrong)
    with pytest.raises(ValueError, match=r"\[codes\] width .*-1\.0$"):
        run("token-decoder", config_path(run_folder, "token-decoder"), [*wrong[:-1], "codes.width=-1.0"])


def test_the_prior_has_no_samples_without_a_decoder(run_folder: Path, tmp_path: Path) -> None:
    for missing in ("decoder", "vqgan"):
        run(
            "prior",
            run_folder / "prior.toml",
            [f"run='{tmp_path / missing}'", *input_overrides(run_folder, but=missing)],
        )
        folder = tmp_path / missing / "prior"
        assert not list(folder.glob("*.png")) and (folder / "prior.safetensors").exists()


def test_a_killed_command_resumes(run_folder: Path, inputs: list[str], tmp_path: Path) -> None:
    """`python -m wuerstchen_core train`, killed and started again, equals one run."""
    changes = [*inputs, "train.steps=8", "train.log_every=4", "train.sheet_every=1000"]
    whole, killed = ([f"run='{tmp_path / name}'", *changes] for name in ("whole", "killed"))
    command = ["train", "text", "--config", str(run_folder / "text.toml"), *(f"--set={change}" for change in killed)]
    process = subprocess.Popen(
        [sys.executable, "-m", "wuerstchen_core", *command], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    while process.poll() is None and not checkpoints(tmp_path / "killed" / "text"):
        time.sleep(0.02)
    process.kill()
    assert "text:" in process.communicate()[1]  # the progress bar
    assert main(command) == 0
    run("text", run_folder / "text.toml", whole)
    assert log_rows(tmp_path / "killed" / "text") == log_rows(tmp_path / "whole" / "text")
    assert_equal_states(ema_of(tmp_path / "killed" / "text"), ema_of(tmp_path / "whole" / "text"))


def test_the_demo_dataset_of_a_short_trial(run_folder: Path) -> None:
    trained, held = DemoDataset(DATA["data"]), DemoDataset(DATA["data"], held_out=True)
    assert len(trained) == 24 and len(held) == 8 and trained.images(slice(None)).shape[1:] == (3, 64, 64)
    assert not set(trained.scenes) & set(held.scenes) and {scene.thing for scene in trained.scenes} == {0, 1}
    assert len(set(trained.sample_batch(StepRandom(0, 0, 24)).tolist())) == 24
    assert trained.sample_batch(StepRandom(0, 0, 30)).shape == (30,)
    assert trained.captions(torch.arange(4), StepRandom(0, 0, 4), drop=1.0) == [""] * 4
    words = trained.captions(torch.zeros(200, dtype=torch.long), StepRandom(0, 0, 200), drop=0.25)
    assert 25 < words.count("") < 75 and len(set(words)) > 20
    assert held.evenly_spaced(3).tolist() == [0, 2, 4] and held.evenly_spaced(100).tolist() == list(range(8))


def test_crops_must_fit_into_the_images(run_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\[vqgan\] crop .*48.*52"):
        run("vqgan", run_folder / "vqgan.toml", [f"run='{tmp_path}'", "vqgan.crop=52"])
