"""Rates of some weights, frozen weights, and several falls of the rate."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.recording_trainer import CONFIG, DeepLineStage, LineStage, assert_same_training
from helpers.tiny_stages import assert_equal_states, checkpoint, read_log

from wuerstchen_core.training.loop import train
from wuerstchen_core.training.rates import learning_rate, set_factors

SGD = replace(CONFIG, steps=1, optimizer="torch.optim.SGD", weight_decay=0.0, clip=1e9, log_every=1)


def trained(folder: Path, factors: dict[str, float] | None, **options: float) -> dict[str, torch.Tensor]:
    train(DeepLineStage(), replace(SGD, lr_factors=factors, **options), folder)
    before = DeepLineStage().net.state_dict()
    return {key: x - before[key] for key, x in checkpoint(folder)["net"].items()}


@pytest.mark.parametrize("muon_lr", [0.0, 0.05])
def test_a_factor_scales_the_change_of_the_weights_with_its_pattern(tmp_path: Path, muon_lr: float) -> None:
    plain = trained(tmp_path / "plain", None, muon_lr=muon_lr)
    scaled = trained(tmp_path / "scaled", {"blocks.*weight": 0.5, "blocks": 4.0, "layer": 0.0}, muon_lr=muon_lr)
    factors = {"blocks.0.weight": 0.5, "blocks.0.bias": 4.0, "layer.weight": 0.0, "layer.bias": 0.0}
    for key, factor in factors.items():
        assert plain[key].any()
        torch.testing.assert_close(scaled[key], factor * plain[key], rtol=1e-4, atol=1e-6)


def test_the_logged_rate_is_that_of_the_other_weights(tmp_path: Path) -> None:
    trained(tmp_path, {"blocks": 4.0})
    assert [row["lr"] for row in read_log(tmp_path)] == [CONFIG.lr * learning_rate(SGD, 0)]


def test_a_run_with_factors_resumes_exactly(tmp_path: Path) -> None:
    config = replace(CONFIG, lr_factors={"bias": 3.0})
    train(LineStage(), config, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(LineStage(stop=6), config, tmp_path / "run")
    train(LineStage(), config, tmp_path / "run")
    assert_same_training(tmp_path / "run", tmp_path / "whole")


def test_factors_of_1_change_nothing(tmp_path: Path) -> None:
    for name, factors in (("one", {"bias": 1.0}), ("none", None)):
        train(LineStage(), replace(CONFIG, lr_factors=factors), tmp_path / name)
    assert_equal_states(checkpoint(tmp_path / "one")["net"], checkpoint(tmp_path / "none")["net"])


@pytest.mark.parametrize(
    ("patterns", "fact"), [({"bais": 2.0}, "bais"), ({"(": 2.0}, r"'\('"), ({"weight": 0.0, "": 0.0}, "all weights")]
)
def test_impossible_factors_are_refused(patterns: dict[str, float], fact: str) -> None:
    with pytest.raises(ValueError, match=f"lr_factors.*{fact}"):
        set_factors(LineStage().net, patterns)


def test_the_rate_falls_several_times_to_its_least_value() -> None:
    config = replace(CONFIG, steps=100, warmup=1, decay=0.8, lr_schedule="linear", lr_cycles=4, lr_least=0.2)
    rates = [learning_rate(config, step) for step in range(100)]
    assert rates[:21] == [1.0] * 21
    for start in (20, 40, 60, 80):
        assert rates[start : start + 20] == pytest.approx([1 - 0.8 * i / 20 for i in range(20)])
    assert learning_rate(config, 100) == pytest.approx(0.2)
    with pytest.raises(ValueError, match="constant"):
        replace(config, lr_schedule="constant")
