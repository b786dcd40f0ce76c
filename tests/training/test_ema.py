"""Weights without a moving average, and optimizers that average by themselves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.averaging_optimizer import BETA
from helpers.recording_trainer import CONFIG, LineStage, assert_same_training
from helpers.tiny_stages import assert_equal_states, checkpoint, ema_of

from wuerstchen_core.training.ema import CurrentWeights
from wuerstchen_core.training.loop import train

AVERAGING = ("helpers.averaging_optimizer.Averaging", "schedulefree.AdamWScheduleFree")


def test_without_an_average_the_weights_are_written(tmp_path: Path) -> None:
    train(LineStage(), CONFIG, tmp_path / "averaged")
    train(LineStage(), replace(CONFIG, ema=0.0), tmp_path / "run")
    trained = checkpoint(tmp_path / "averaged")["net"]
    assert_equal_states(checkpoint(tmp_path / "run")["net"], trained)
    assert_equal_states(ema_of(tmp_path / "run"), trained)
    assert not torch.equal(ema_of(tmp_path / "averaged")["layer.weight"], trained["layer.weight"])


def test_no_average_takes_no_memory() -> None:
    net = LineStage().net
    values, own = CurrentWeights(net, [torch.optim.SGD(net.parameters())]).values, net.state_dict()
    assert values.keys() == own.keys() and all(x.data_ptr() == own[key].data_ptr() for key, x in values.items())


@pytest.mark.parametrize("optimizer", AVERAGING)
def test_an_optimizer_that_averages_resumes_exactly_and_grids_change_nothing(optimizer: str, tmp_path: Path) -> None:
    pytest.importorskip(optimizer.partition(".")[0])
    config = replace(CONFIG, ema=0.0, optimizer=optimizer, lr_schedule="constant")
    train(LineStage(), config, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(LineStage(stop=6), config, tmp_path / "run")
    train(LineStage(), config, tmp_path / "run")
    assert_same_training(tmp_path / "run", tmp_path / "whole")
    train(LineStage(), replace(config, sheet_every=1), tmp_path / "grids")
    assert_equal_states(checkpoint(tmp_path / "grids")["net"], checkpoint(tmp_path / "whole")["net"])
    with pytest.raises(ValueError, match="ema"):
        train(LineStage(), replace(config, ema=0.5), tmp_path / "averaged twice")


def test_the_written_weights_are_the_mean_of_the_optimizers(tmp_path: Path) -> None:
    config, means, mean = replace(CONFIG, ema=0.0, optimizer=AVERAGING[0], save_every=1, keep=9), 0, None
    train(LineStage(), config, tmp_path)
    for step in range(1, 9):
        saved = torch.load(tmp_path / f"checkpoint-{step:08d}.pt", weights_only=True)
        z, x, y = saved["optimizers"]["averaging"]["state"][0]["z"], *(
            saved[name]["layer.weight"] for name in ("average", "net")
        )  # fmt: skip
        mean = z if mean is None else mean + (z - mean) / step
        torch.testing.assert_close(x, mean, rtol=0, atol=1e-6)
        torch.testing.assert_close(y, (1 - BETA) * z + BETA * x, rtol=0, atol=1e-6)
        means += not torch.allclose(x, y, atol=1e-4)
    assert means > 4
