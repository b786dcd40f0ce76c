"""Two processes train what one trains."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from train_apart import CONFIG_APART
from training_line import DeepLineStage, files
from training_stages import checkpoint, ema_of, launch, read_log

from wuerstchen_core.training.chance import Chance
from wuerstchen_core.training.loop import train

APART = Path(__file__).with_name("train_apart.py")


@pytest.mark.parametrize(
    ("way", "muon_lr", "launcher"),
    [("replicated", CONFIG_APART.muon_lr, "accelerate"), ("sharded", 0.0, "torchrun")],
)
def test_two_processes_train_what_one_trains(tmp_path: Path, way: str, muon_lr: float, launcher: str) -> None:
    """A batch of 4 in one process, or 2 in each of two: the same weights after 20 steps, and one log."""
    train(DeepLineStage(dropout=0.0), replace(CONFIG_APART, batch=4, muon_lr=muon_lr), tmp_path / "one")
    launch(str(APART), way, str(tmp_path / "two"), by=launcher)
    one, two = checkpoint(tmp_path / "one"), checkpoint(tmp_path / "two")
    assert one["step"] == two["step"] == 20
    for key in ("net", "average"):
        assert one[key].keys() == two[key].keys()
        for name, x in one[key].items():
            if name != "seen":  # a buffer: each process has seen its own half
                torch.testing.assert_close(two[key][name], x, rtol=0, atol=2e-6)
    assert [row["step"] for row in read_log(tmp_path / "two")] == [row["step"] for row in read_log(tmp_path / "one")]
    losses = [[row["loss"] for row in read_log(tmp_path / name)] for name in ("one", "two")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert files(tmp_path / "two") == files(tmp_path / "one")
    start, end = (DeepLineStage(dropout=0.0).net.state_dict(), ema_of(tmp_path / "two"))
    assert not torch.allclose(start["layer.weight"], end["layer.weight"], atol=0.1)


def test_a_samples_chance_is_its_places_alone() -> None:
    def drawn(places: range | None) -> list[torch.Tensor]:
        chance = Chance(3, 7, 6, places)
        return [
            chance.uniform(), chance.uniform(2), chance.normal(2, 3), chance.integers(50), chance.integers(50, 4),
            chance.permutations(9), chance.strata(), chance.pick(100), chance.pick(4), chance.uniform(),
        ]  # fmt: skip

    whole, parts = drawn(None), [drawn(range(0, 2)), drawn(range(2, 6))]
    for one, *halves in zip(whole, *parts, strict=True):
        assert torch.equal(one, torch.cat(halves))
    assert not torch.equal(whole[0], whole[-1]) and len(whole[7].unique()) == 6
    assert not torch.equal(Chance(3, 8, 6).normal(2), Chance(3, 7, 6).normal(2))
    assert not torch.equal(Chance(4, 7, 6).uniform(), Chance(3, 7, 6).uniform())
