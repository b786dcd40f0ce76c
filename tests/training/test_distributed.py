"""Two processes train what one trains."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.lora_training import write_config
from helpers.picture_folders import examples, write_folder
from helpers.recording_trainer import DeepLineStage, file_names
from helpers.tiny_stages import checkpoint, ema_of, launch, read_log
from helpers.training_process import PROCESS_CONFIG
from PIL import Image

from wuerstchen_core.training.loop import train
from wuerstchen_core.training.rng import StepRandom
from wuerstchen_core.training.run import run

SCRIPT = Path(__file__).parents[1] / "helpers" / "training_process.py"


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of two trainings in two processes."""
    folder = tmp_path_factory.mktemp("two")
    launch(str(SCRIPT), str(folder), by="accelerate")
    return folder


@pytest.mark.parametrize(("mode", "muon_lr"), [("replicated", PROCESS_CONFIG.muon_lr), ("sharded", 0.0)])
def test_two_processes_train_what_one_trains(tmp_path: Path, launched: Path, mode: str, muon_lr: float) -> None:
    """A batch of 4 in one process equals 2 in each of two: same weights after 20 steps, one log."""
    train(DeepLineStage(dropout=0.0), replace(PROCESS_CONFIG, batch=4, muon_lr=muon_lr), tmp_path)
    folders = (tmp_path, launched / mode)
    one, two = map(checkpoint, folders)
    assert one["step"] == two["step"] == 20
    for key in ("net", "average"):
        assert one[key].keys() == two[key].keys()
        for name, x in one[key].items():
            if name != "seen":  # a buffer of each process's own samples
                torch.testing.assert_close(two[key][name], x, rtol=0, atol=2e-6)
    logs = [read_log(folder) for folder in folders]
    assert [row["step"] for row in logs[1]] == [row["step"] for row in logs[0]]
    assert [row["loss"] for row in logs[1]] == pytest.approx([row["loss"] for row in logs[0]], rel=1e-4)
    assert file_names(launched / mode) == file_names(tmp_path)
    start, end = DeepLineStage(dropout=0.0).net.state_dict(), ema_of(launched / mode)
    assert not torch.allclose(start["layer.weight"], end["layer.weight"], atol=0.1)


@pytest.mark.long
@pytest.mark.parametrize(
    ("stage", "wrapped"),
    [("lora", {"FSDP_AUTO_WRAP_POLICY": "NO_WRAP"}), ("prior", {"FSDP_TRANSFORMER_CLS_TO_WRAP": "AttnBlock,ResBlock"})],
)
def test_accelerates_fsdp_trains_the_same(stage: str, wrapped: dict[str, str], bundle: Path, tmp_path: Path) -> None:
    """Version 2 of FSDP, in two processes that stop and resume: same weights, validation losses and sample grids."""
    config = write_config(tmp_path, bundle)
    data = f"{{source='{write_folder(tmp_path / 'pictures', examples(range(12)))}', size=64, multiple=64, workers=0}}"
    changes = [
        f"data={data}", "train.save_every=1", "train.sheet_every=2", "validation.fraction=0.25", "validation.every=1",
        "sample.prompts=['a red apple']", "sample.every=1", "sample.width=64", "sample.height=64",
    ]  # fmt: skip
    if stage == "prior":
        text = re.sub(r"\[lora\].*?(?=\[train\])", "", config.read_text("utf-8"), flags=re.S)
        config.write_text(text, encoding="utf-8")
    changes += ["lora.dropout=0.0"] if stage == "lora" else [f"start='{bundle}'", "train.lr=1e-4"]
    one = run(stage, config, [*changes, f"run='{tmp_path / 'one'}'", "train.batch=4", "train.steps=3"]).parent
    policy = {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", **wrapped}
    for steps in (2, 3):
        own = [*changes, f"run='{tmp_path / 'two'}'", "train.batch=2", f"train.steps={steps}"]
        options = [x for change in own for x in ("--set", change)]
        command = ["-m", "wuerstchen_core", "train", stage, "--config", str(config), *options]
        launch(*command, variables={"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", **policy})
    two = tmp_path / "two" / stage
    assert file_names(two) == file_names(one)
    for name, x in checkpoint(one)["average"].items():
        torch.testing.assert_close(checkpoint(two)["average"][name], x, rtol=0, atol=2e-5)
    losses = [[row["validation"] for row in read_log(folder) if "validation" in row] for folder in (one, two)]
    assert len(losses[0]) == 4 and losses[1] == pytest.approx(losses[0], rel=1e-5)
    for name in ("samples-000000.png", "samples-000003.png", "sheet-000003.png"):
        pictures = [np.asarray(Image.open(folder / name)).astype(int) for folder in (one, two)]
        assert np.abs(pictures[0] - pictures[1]).max() <= 1


def test_random_numbers_depend_on_the_index_in_the_batch_alone() -> None:
    def drawn(indices: range | None) -> list[torch.Tensor]:
        rng = StepRandom(3, 7, 6, indices)
        return [
            rng.uniform(), rng.uniform(2), rng.normal(2, 3), rng.integers(50), rng.integers(50, 4),
            rng.permutations(9), rng.strata(), rng.pick(100), rng.pick(4), rng.uniform(),
        ]  # fmt: skip

    whole, parts = drawn(None), [drawn(range(0, 2)), drawn(range(2, 6))]
    for one, *halves in zip(whole, *parts, strict=True):
        assert torch.equal(one, torch.cat(halves))
    assert not torch.equal(whole[0], whole[-1]) and len(whole[7].unique()) == 6
    assert not torch.equal(StepRandom(3, 8, 6).normal(2), StepRandom(3, 7, 6).normal(2))
    assert not torch.equal(StepRandom(4, 7, 6).uniform(), StepRandom(3, 7, 6).uniform())
