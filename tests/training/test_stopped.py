"""A stopped training resumes exactly, and leaves no incomplete file."""

from __future__ import annotations

import io
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from helpers.recording_trainer import CONFIG, DeepLineStage, LineStage, assert_same_training, file_names
from helpers.tiny_stages import checkpoint, read_log
from PIL import Image

from wuerstchen_core.checkpoints import writer
from wuerstchen_core.training.loop import learning_rate, train
from wuerstchen_core.training.optim import build_optimizers
from wuerstchen_core.training.sharding import load_optimizer


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of eight steps."""
    return train(LineStage(), CONFIG, tmp_path_factory.mktemp("whole")).parent


@pytest.mark.parametrize("stop", [1, 2, 4, 5, 6, 8])
def test_a_stopped_run_resumes_exactly(tmp_path: Path, whole: Path, stop: int) -> None:
    with pytest.raises(KeyboardInterrupt) as stopped:
        train(LineStage(stop=stop), CONFIG, tmp_path)
    steps = [stop - 1, 4, stop - 5] if stop > 4 else [stop - 1]  # done, of the checkpoint, since then
    assert [int(x) for x in re.findall(r"\d+", str(stopped.value))] == steps
    torch.manual_seed(999)  # the global generator must not matter
    stage = LineStage()
    train(stage, CONFIG, tmp_path)
    assert stage.losses == (8 if stop <= 4 else 4)  # from the last checkpoint, at step 4
    assert_same_training(tmp_path, whole)


def test_muon_trains_the_matrices_of_the_blocks_and_resumes_exactly(tmp_path: Path) -> None:
    config = replace(CONFIG, muon_lr=0.05)
    optimizers = build_optimizers(DeepLineStage().net, torch.device("cpu"), config.muon_lr)
    assert [tuple(p.shape) for p in optimizers["muon"].param_groups[0]["params"]] == [(4, 4)]
    assert len(optimizers["adamw"].param_groups[0]["params"]) == 3
    assert set(build_optimizers(DeepLineStage().net, torch.device("cpu"))) == {"adamw"}
    with pytest.raises(ValueError, match="muon_lr .*AdamW"):
        build_optimizers(torch.nn.ModuleDict({"blocks": torch.nn.Linear(4, 4, bias=False)}), torch.device("cpu"), 0.1)
    train(DeepLineStage(), config, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(DeepLineStage(stop=6), config, tmp_path / "stopped")
    train(DeepLineStage(), config, tmp_path / "stopped")
    assert_same_training(tmp_path / "stopped", tmp_path / "whole")
    train(DeepLineStage(), CONFIG, tmp_path / "adamw")
    weights = [checkpoint(tmp_path / name)["net"]["blocks.0.weight"] for name in ("whole", "adamw")]
    assert not torch.equal(*weights)


def test_a_finished_run_does_not_change(tmp_path: Path, whole: Path) -> None:
    folder = shutil.copytree(whole, tmp_path / "again")
    stage = LineStage()
    train(stage, CONFIG, folder)
    assert stage.losses == 0 and stage.train_modes == []
    assert_same_training(folder, whole)


@pytest.mark.parametrize("broken", ["torch.save", "samples", "bundle"])
def test_an_interrupt_while_writing_keeps_the_last_files(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    """An interrupt in the middle of a file at step 8 leaves the files of step 4, and no partial file."""
    calls = []

    def interrupted(write: Any) -> Any:
        def writer(*arguments: Any, **options: Any) -> Any:
            calls.append(1)
            if len(calls) == 1:
                return write(*arguments, **options)
            target = next(item for item in arguments if isinstance(item, Path | io.IOBase))
            target.write_bytes(b"half") if isinstance(target, Path) else target.write(b"half")
            raise KeyboardInterrupt

        return writer

    with monkeypatch.context() as patch:
        if broken == "torch.save":
            patch.setattr(torch, "save", interrupted(torch.save))
        elif broken == "samples":
            patch.setattr(Image.Image, "save", interrupted(Image.Image.save))
        else:
            patch.setattr(writer, "_write", interrupted(writer._write))
        with pytest.raises(KeyboardInterrupt):
            train(LineStage(), CONFIG, tmp_path)
    assert len(calls) == 2 and checkpoint(tmp_path)["step"] == 4
    assert not [name for name in file_names(tmp_path) if "part" in name]
    train(LineStage(), CONFIG, tmp_path)
    assert_same_training(tmp_path, whole)


def test_an_incomplete_row_of_the_log_is_dropped(tmp_path: Path, whole: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(LineStage(stop=7), CONFIG, tmp_path)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')
    train(LineStage(), CONFIG, tmp_path)
    assert_same_training(tmp_path, whole)


def test_rows_before_the_first_checkpoint_of_a_stopped_run_are_dropped(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(LineStage(stop=4), CONFIG, tmp_path)
    assert [row["step"] for row in read_log(tmp_path)] == [3]
    train(LineStage(), CONFIG, tmp_path)
    assert [row["step"] for row in read_log(tmp_path)] == [3, 6, 8]


def test_seconds_add_up_over_resumed_runs(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(LineStage(stop=6), CONFIG, tmp_path)
    file = tmp_path / "log.jsonl"
    file.write_text(file.read_text().replace(f'"seconds": {read_log(tmp_path)[0]["seconds"]}', '"seconds": 5000.0'))
    train(LineStage(), CONFIG, tmp_path)
    assert [row["seconds"] >= 5000 for row in read_log(tmp_path)] == [True] * 3


@pytest.mark.parametrize("change", [{"lr": 0.01}, {"betas": (0.5, 0.9)}, {"weight_decay": 3.0}])
def test_a_changed_configuration_takes_effect_at_once(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(LineStage(stop=5), CONFIG, tmp_path)
    used = []
    step = torch.optim.AdamW.step
    names = ("lr", "betas", "weight_decay")

    def recorded(self: torch.optim.AdamW, *arguments: Any, **options: Any) -> Any:
        used.append({name: self.param_groups[0][name] for name in names})
        return step(self, *arguments, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", recorded)
    config = replace(CONFIG, **change)
    train(LineStage(), config, tmp_path)
    rates = [config.lr * learning_rate(config, step) for step in range(4, 8)]
    assert [row["lr"] for row in used] == pytest.approx(rates, rel=1e-12)
    assert all((row["betas"], row["weight_decay"]) == (config.betas, config.weight_decay) for row in used)
    assert not torch.equal(checkpoint(tmp_path)["net"]["layer.weight"], checkpoint(whole)["net"]["layer.weight"])


@pytest.mark.parametrize(("before", "now"), [(None, True), (True, None)])
def test_a_checkpoint_does_not_change_whether_an_optimizer_is_fused(before: bool | None, now: bool | None) -> None:
    def optimizer_on(device: str, fused: bool | None) -> torch.optim.AdamW:
        return torch.optim.AdamW([torch.nn.Parameter(torch.ones(2, device=device))], fused=fused)

    saved = optimizer_on("cpu", before)
    saved.param_groups[0]["params"][0].sum().backward()
    saved.step()
    resumed = optimizer_on("cpu", now)
    load_optimizer(resumed, saved.state_dict())
    [(weight, state)] = resumed.state.items()
    assert resumed.param_groups[0]["fused"] is now and state["step"] == 1 and state["exp_avg"].shape == weight.shape
    meta = optimizer_on("meta", True)  # like a GPU, where a fused optimizer needs its step on the device
    load_optimizer(meta, saved.state_dict())
    assert next(iter(meta.state.values()))["step"].device.type == "meta"


@pytest.fixture
def compiling(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Makes accelerate compile networks; it reads the environment only once."""
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "eager")
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_a_compiled_network_is_saved_under_its_own_keys(whole: Path, compiling: None, tmp_path: Path) -> None:
    train(LineStage(), CONFIG, tmp_path)
    for name in ("net", "average"):
        assert checkpoint(tmp_path)[name].keys() == checkpoint(whole)[name].keys()
    assert file_names(tmp_path) == file_names(whole)
