"""Optimizers by import path, their arguments, and the courses of their rates."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.recording_trainer import CONFIG, DeepLineStage, LineStage, assert_same_training
from helpers.tiny_stages import checkpoint, read_log
from torch import nn

from wuerstchen_core.common.dataclass_config import from_table
from wuerstchen_core.training.config import LoopConfig, read_config
from wuerstchen_core.training.loop import learning_rate, train
from wuerstchen_core.training.optim import build_optimizers, group_settings, set_group

OPTIMIZERS: dict[str, tuple[float, dict[str, Any]]] = {  # rate and arguments
    "torch.optim.Adafactor": (0.05, {"d": 2.0}),
    "torch.optim.SGD": (0.05, {"momentum": 0.9, "nesterov": True}),
    "prodigyopt.Prodigy": (1.0, {"d0": 1e-3, "safeguard_warmup": True}),
    "bitsandbytes.optim.AdamW8bit": (0.05, {"min_8bit_size": 1}),
}


@pytest.mark.parametrize("path", OPTIMIZERS)
def test_an_optimizer_trains_and_resumes_exactly(path: str, tmp_path: Path) -> None:
    pytest.importorskip(path.partition(".")[0])
    lr, arguments = OPTIMIZERS[path]
    config = replace(CONFIG, lr=lr, optimizer=path, optimizer_args=arguments)
    train(LineStage(), config, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(LineStage(stop=6), config, tmp_path / "run")
    train(LineStage(), config, tmp_path / "run")
    assert_same_training(tmp_path / "run", tmp_path / "whole")
    assert [row["lr"] for row in read_log(tmp_path / "run")] == [lr * learning_rate(config, step) for step in (2, 5, 7)]
    saved = checkpoint(tmp_path / "run")
    assert list(saved["optimizers"]) == [path.rpartition(".")[2].lower()]
    assert not torch.equal(saved["net"]["layer.weight"], LineStage().net.layer.weight)
    with pytest.raises(ValueError, match="optimizer"):
        train(LineStage(), CONFIG, tmp_path / "run")


def test_arguments_and_the_weight_decay_reach_the_optimizer(tmp_path: Path) -> None:
    """SGD's own weight decay is 0; the arguments come before the keys of [train], also after resuming."""
    config = replace(CONFIG, optimizer="torch.optim.SGD", optimizer_args={"momentum": 0.5}, weight_decay=0.25)
    train(LineStage(), config, tmp_path)
    later = replace(config, steps=12, optimizer_args={"momentum": 0.7, "weight_decay": 0.125})
    for one, expected in ((config, (0.5, 0.25)), (later, (0.7, 0.125))):
        train(LineStage(), one, tmp_path)
        [group] = checkpoint(tmp_path)["optimizers"]["sgd"]["param_groups"]
        assert (group["momentum"], group["weight_decay"]) == expected


def test_muon_trains_beside_another_optimizer() -> None:
    found = build_optimizers(DeepLineStage().net, torch.device("cpu"), 0.05, "torch.optim.SGD")
    assert {name: sum(p.numel() for p in x.param_groups[0]["params"]) for name, x in found.items()} == {
        "sgd": 9, "muon": 16,
    }  # fmt: skip


def test_a_rate_in_a_tensor_stays_there() -> None:
    """torchao keeps rates in tensors, so that torch.compile does not compile again."""
    lr = torch.tensor(1.0)
    group = {"lr": lr, "weight_decay": 0.0}
    set_group(group, group_settings(replace(CONFIG, weight_decay=0.5), "adamw"), 0.25)
    assert group == {"lr": lr, "weight_decay": 0.5} and group["lr"] is lr and lr == 0.25


MISTAKES: dict[str, tuple[str, dict[str, Any], str]] = {
    "no path": ("AdamW", {}, "AdamW .*torch.optim.AdamW"),
    "no library": ("wuerstchen_none.Prodigy", {}, "wuerstchen_none is not installed"),
    "no class": ("torch.optim.AdanW", {}, r"AdanW .*AdamW\?"),
    "a module": ("torch.optim.sgd", {}, "torch.optim.sgd is not"),
    "no optimizer": ("torch.nn.Linear", {}, "torch.nn.Linear is not"),
    "a closure": ("torch.optim.LBFGS", {}, "LBFGS .*closure"),
    "unknown": ("torch.optim.SGD", {"momentun": 0.9}, r"momentun .*momentum\?"),
    "invalid": ("torch.optim.SGD", {"momentum": -0.9}, r"torch.optim.SGD: .*-0\.9"),
    "mistyped": ("torch.optim.SGD", {"momentum": "high"}, "torch.optim.SGD"),
    "the rate": ("torch.optim.SGD", {"lr": 0.1}, r"lr \(set \[train\] lr\)"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named_in_one_line(name: str) -> None:
    path, arguments, facts = MISTAKES[name]
    with pytest.raises(ValueError, match=facts) as error:
        build_optimizers(nn.Linear(2, 2), torch.device("cpu"), 0.0, path, arguments)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_a_library_that_cannot_be_imported_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_optimizers.py").write_text("raise RuntimeError('no GPU')", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="broken_optimizers .*no GPU"):
        build_optimizers(nn.Linear(2, 2), torch.device("cpu"), 0.0, "broken_optimizers.Adam")


def test_arguments_are_read_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text('[train]\nsteps = 1\nbatch = 1\nlr = 1.0\noptimizer = "torch.optim.Adam"\n', encoding="utf-8")
    table = read_config(file, ["train.optimizer_args.eps=1e-6", "train.optimizer_args.betas=[0.5, 0.6]"])["train"]
    config = from_table(LoopConfig, table, "train")
    assert config.optimizer_args == {"eps": 1e-6, "betas": (0.5, 0.6)}
    [group] = build_optimizers(
        nn.Linear(2, 2), torch.device("cpu"), 0.0, config.optimizer, config.optimizer_args
    )["adam"].param_groups  # fmt: skip
    assert (group["eps"], group["betas"]) == (1e-6, (0.5, 0.6))
    with pytest.raises(ValueError, match=r"\[train\] optimizer_args .*'x'"):
        from_table(LoopConfig, {**table, "optimizer_args": "x"}, "train")


def test_the_courses_of_the_rate() -> None:
    config = replace(CONFIG, steps=100, warmup=10, decay=0.5)
    rates = {
        name: [learning_rate(replace(config, lr_schedule=name), step) for step in range(101)]
        for name in ("constant", "linear", "cosine")
    }
    for one in rates.values():
        assert one[:10] == pytest.approx([(step + 1) / 10 for step in range(10)]) and set(one[10:51]) == {1.0}
    assert set(rates["constant"][51:]) == {1.0}
    assert [rates["linear"][i] for i in (75, 100)] == [0.5, 0]
    assert rates["cosine"][75] == pytest.approx(0.5) and rates["cosine"][100] == 0
    assert rates["cosine"][60] > rates["linear"][60] and rates["cosine"][90] < rates["linear"][90]
    whole = replace(config, lr_schedule="cosine", decay=1.0, warmup=1)
    assert [learning_rate(whole, step) for step in (0, 50)] == pytest.approx([1.0, 0.5])
