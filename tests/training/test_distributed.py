"""Two processes train what one trains."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.recording_trainer import DeepLineStage, file_names
from helpers.tiny_stages import checkpoint, ema_of, launch, read_log
from helpers.training_process import PROCESS_CONFIG

from wuerstchen_core.training.loop import train
from wuerstchen_core.training.rng import StepRandom

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
