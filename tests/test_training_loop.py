"""The training loop on the smallest thing that learns: what is stopped goes on exactly, and nothing is half-written."""

from __future__ import annotations

import io
import shutil
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from training_stages import assert_equal_states, checkpoint, ema_of, read_log, shown

from wuerstchen_core.checkpoints import write
from wuerstchen_core.training import loop
from wuerstchen_core.training.config import LoopConfig
from wuerstchen_core.training.loop import Stage, build_optimizers, learning_rate, replace_file, train

CONFIG = LoopConfig(steps=8, batch=4, lr=0.05, warmup=2, ema=0.8, log_every=3, save_every=4, sheet_every=4)


@dataclass(frozen=True)
class LineParams:
    width: int = 4


class Line(nn.Module):
    """A linear layer behind dropout."""

    def __init__(self, params: LineParams):
        super().__init__()
        self.params = params
        self.layer = nn.Linear(params.width, 1)
        self.register_buffer("seen", torch.zeros(params.width))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen += x.mean(0)
        return self.layer(F.dropout(x, 0.3, self.training))


class LineStage(Stage[Line]):
    """Learns the sum of its inputs. `stop` raises KeyboardInterrupt at a step; `spoil` makes a loss that is none."""

    name, tables = "prior", ()

    def __init__(self, width: int = 4, stop: int | None = None, spoil: int | None = None):
        torch.manual_seed(1)
        self.net, self.stop, self.spoil, self.width, self.losses = Line(LineParams(width)), stop, spoil, width, 0
        self.trained_in_train_mode: list[bool] = []

    def batch(self, step: int, size: int, rng: torch.Generator) -> tuple[Any, ...]:
        return (torch.randn(size, self.width, generator=rng),)

    def loss(self, net: Line, *batch: Any) -> Tensor:
        self.losses += 1
        if self.losses == self.stop:
            raise KeyboardInterrupt
        self.trained_in_train_mode.append(net.training)
        (x,) = batch
        loss = F.mse_loss(net(x), x.sum(1, keepdim=True))
        return loss * torch.nan if self.losses == self.spoil else loss

    def sheet(self, net: Line) -> Image.Image | None:
        assert not net.training and not torch.is_grad_enabled()
        return Image.new("RGB", (4, 4), (1, 2, 3))

    def parts(self, net: Line) -> dict[str, nn.Module]:
        return {"prior": net}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight steps at once."""
    folder = tmp_path_factory.mktemp("whole")
    assert train(LineStage(), CONFIG, folder) == folder / "prior.safetensors"
    return folder


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def assert_same_training(folder: Path, whole: Path) -> None:
    assert shown(read_log(folder)) == shown(read_log(whole))
    assert_equal_states(ema_of(folder), ema_of(whole))
    assert_equal_states(checkpoint(folder)["net"], checkpoint(whole)["net"])
    assert (folder / "prior.safetensors").read_bytes() == (whole / "prior.safetensors").read_bytes()
    assert files(folder) == files(whole)


def test_a_run_folder(whole: Path) -> None:
    names = {"checkpoint.pt", "log.jsonl", "prior.safetensors", "sheet-000004.png", "sheet-000008.png"}
    assert files(whole) == names
    rows = read_log(whole)
    assert [row["step"] for row in rows] == [3, 6, 8]
    assert all(set(row) == {"step", "loss", "lr", "seconds"} for row in rows)
    with Image.open(whole / "sheet-000008.png") as sheet:
        assert sheet.format == "PNG" and sheet.getpixel((0, 0)) == (1, 2, 3)


@pytest.mark.parametrize("stop", [1, 2, 4, 5, 6, 8])
def test_a_stopped_run_goes_on_as_if_it_had_never_been_stopped(tmp_path: Path, whole: Path, stop: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(LineStage(stop=stop), CONFIG, tmp_path)
    torch.manual_seed(999)  # nothing may hang on chance from outside
    stage = LineStage()
    train(stage, CONFIG, tmp_path)
    assert stage.losses == (8 if stop <= 4 else 4)  # from the last checkpoint, at step 4
    assert_same_training(tmp_path, whole)


class DeepLine(Line):
    """A line with a block before it, whose matrix Muon can train."""

    def __init__(self, params: LineParams):
        super().__init__(params)
        self.blocks = nn.ModuleList([nn.Linear(params.width, params.width)])

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.blocks[0](x))


class DeepLineStage(LineStage):
    def __init__(self, **options: Any):
        super().__init__(**options)
        self.net = DeepLine(LineParams())

    def parts(self, net: Line) -> dict[str, nn.Module]:
        part = Line(net.params)  # a bundle's prior is one of ours: the block is left out
        part.load_state_dict(net.state_dict(), strict=False)
        return {"prior": part}


def test_muon_trains_the_matrices_of_the_blocks_and_goes_on_exactly_too(tmp_path: Path) -> None:
    config = replace(CONFIG, muon_lr=0.05)
    optimizers = build_optimizers(DeepLineStage().net, config)
    assert [tuple(p.shape) for p in optimizers["muon"].param_groups[0]["params"]] == [(4, 4)]
    assert len(optimizers["adamw"].param_groups[0]["params"]) == 3
    assert set(build_optimizers(DeepLineStage().net, CONFIG)) == {"adamw"}
    train(DeepLineStage(), config, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(DeepLineStage(stop=6), config, tmp_path / "stopped")
    train(DeepLineStage(), config, tmp_path / "stopped")
    assert_same_training(tmp_path / "stopped", tmp_path / "whole")
    train(DeepLineStage(), CONFIG, tmp_path / "adamw")
    weights = [checkpoint(tmp_path / name)["net"]["blocks.0.weight"] for name in ("whole", "adamw")]
    assert not torch.equal(*weights)


def test_a_finished_run_is_left_alone(tmp_path: Path, whole: Path) -> None:
    folder = shutil.copytree(whole, tmp_path / "again")
    stage = LineStage()
    train(stage, CONFIG, folder)
    assert stage.losses == 0 and stage.trained_in_train_mode == []
    assert_same_training(folder, whole)


@pytest.mark.parametrize("broken", ["torch.save", "sheet", "bundle"])
def test_an_interrupt_while_writing_leaves_the_last_state_whole(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    """At step 8, half-way through a file: all of step 4 is still there, and no part of a file."""
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
        elif broken == "sheet":
            patch.setattr(Image.Image, "save", interrupted(Image.Image.save))
        else:
            patch.setattr(write, "_write", interrupted(write._write))
        with pytest.raises(KeyboardInterrupt):
            train(LineStage(), CONFIG, tmp_path)
    assert len(calls) == 2 and checkpoint(tmp_path)["step"] == 4
    assert not [name for name in files(tmp_path) if "part" in name]
    train(LineStage(), CONFIG, tmp_path)
    assert_same_training(tmp_path, whole)


def test_a_row_that_was_cut_short_is_dropped(tmp_path: Path, whole: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(LineStage(stop=7), CONFIG, tmp_path)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')
    train(LineStage(), CONFIG, tmp_path)
    assert_same_training(tmp_path, whole)


def test_rows_of_a_run_that_was_stopped_before_its_first_checkpoint_go(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(LineStage(stop=4), CONFIG, tmp_path)
    assert [row["step"] for row in read_log(tmp_path)] == [3]
    train(LineStage(), CONFIG, tmp_path)
    assert [row["step"] for row in read_log(tmp_path)] == [3, 6, 8]


def test_seconds_are_those_of_all_runs_together(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(LineStage(stop=6), CONFIG, tmp_path)
    file = tmp_path / "log.jsonl"
    file.write_text(file.read_text().replace(f'"seconds": {read_log(tmp_path)[0]["seconds"]}', '"seconds": 5000.0'))
    train(LineStage(), CONFIG, tmp_path)
    assert [row["seconds"] >= 5000 for row in read_log(tmp_path)] == [True] * 3


def test_a_checkpoint_without_losses_is_read_too(tmp_path: Path, whole: Path) -> None:
    """As the first trainers wrote it; only the row after it then averages over fewer steps."""
    with pytest.raises(KeyboardInterrupt):
        train(LineStage(stop=5), CONFIG, tmp_path)
    contents = checkpoint(tmp_path)
    assert len(contents.pop("losses")) == 1
    torch.save(contents, tmp_path / "checkpoint.pt")
    train(LineStage(), CONFIG, tmp_path)
    assert_equal_states(ema_of(tmp_path), ema_of(whole))


@pytest.mark.parametrize("change", [{"lr": 0.01}, {"betas": (0.5, 0.9)}, {"weight_decay": 3.0}])
def test_a_changed_configuration_takes_effect_at_once(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(LineStage(stop=5), CONFIG, tmp_path)
    used = []
    step = torch.optim.AdamW.step
    names = ("lr", "betas", "weight_decay")

    def watched(self: torch.optim.AdamW, *arguments: Any, **options: Any) -> Any:
        used.append({name: self.param_groups[0][name] for name in names})
        return step(self, *arguments, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    config = replace(CONFIG, **change)
    train(LineStage(), config, tmp_path)
    rates = [config.lr * learning_rate(config, step) for step in range(4, 8)]
    assert [row["lr"] for row in used] == pytest.approx(rates, rel=1e-12)
    assert all((row["betas"], row["weight_decay"]) == (config.betas, config.weight_decay) for row in used)
    assert not torch.equal(checkpoint(tmp_path)["net"]["layer.weight"], checkpoint(whole)["net"]["layer.weight"])


def test_the_ema_is_the_moving_average(tmp_path: Path) -> None:
    """Weights and buffers, from the first step's on; by hand from the weights after every step."""
    config = replace(CONFIG, save_every=1)
    kept: list[dict[str, Tensor]] = []
    for step in range(1, 9):
        with nullcontext() if step == 8 else pytest.raises(KeyboardInterrupt):
            train(LineStage(stop=2), config, tmp_path)
        kept.append(checkpoint(tmp_path)["net"])
        assert checkpoint(tmp_path)["step"] == step
    ema = kept[0]
    for weights in kept[1:]:
        ema = {key: 0.8 * ema[key] + 0.2 * weights[key] for key in ema}
    for key, value in ema_of(tmp_path).items():
        torch.testing.assert_close(value, ema[key.removeprefix("module.")], rtol=0, atol=1e-6)
    assert not torch.allclose(ema["layer.weight"], kept[-1]["layer.weight"], atol=1e-4)


def test_the_learning_rate_rises_stays_and_falls() -> None:
    config = replace(CONFIG, steps=100, warmup=10, decay=0.2)
    rates = [learning_rate(config, step) for step in range(101)]
    assert rates[0] == 0.1 and rates[4] == 0.5 and rates[9:81] == [1.0] * 72
    assert rates[90] == 0.5 and rates[99] == pytest.approx(0.05) and rates[100] == 0
    assert rates[:10] == sorted(rates[:10]) and rates[80:] == sorted(rates[80:], reverse=True)
    constant = replace(config, warmup=0, decay=0.0)
    assert [learning_rate(constant, step) for step in range(100)] == [1.0] * 100


def test_a_loss_that_is_no_number_stops_before_it_spoils_the_checkpoint(tmp_path: Path) -> None:
    config = replace(CONFIG, log_every=100)
    with pytest.raises(ValueError, match="^the loss of prior is nan at step 8: lower the learning rate$"):
        train(LineStage(spoil=6), config, tmp_path)
    assert checkpoint(tmp_path)["step"] == 4
    assert all(x.isfinite().all() for x in ema_of(tmp_path).values())


def test_a_foreign_or_damaged_checkpoint_is_named(tmp_path: Path, whole: Path) -> None:
    folder = shutil.copytree(whole, tmp_path / "run")
    message = (
        r"checkpoint.pt is damaged or of a network of other sizes: restore \[model\], or choose another run folder$"
    )
    with pytest.raises(ValueError, match=message):
        train(LineStage(width=5), CONFIG, folder)
    whole_file = (folder / "checkpoint.pt").read_bytes()
    for content in (whole_file[: len(whole_file) // 2], b"", b"no checkpoint", b"\x80\x02"):
        (folder / "checkpoint.pt").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            train(LineStage(), CONFIG, folder)
    assert shown(read_log(folder)) == shown(read_log(whole))


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    replace_file(path, lambda part: part.write_text("old"))

    def fail(part: Path) -> None:
        part.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        replace_file(path, fail)
    assert path.read_text() == "old" and files(tmp_path) == {"file"}


def test_the_network_trains_in_train_mode_also_after_a_sheet(whole: Path, tmp_path: Path) -> None:
    stage = LineStage()
    train(stage, CONFIG, tmp_path)
    assert stage.trained_in_train_mode == [True] * 8


def test_progress_is_shown_with_loss_and_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown_values: list[dict[str, str]] = []
    monkeypatch.setattr(loop.tqdm, "set_postfix", lambda self, **values: shown_values.append(values))
    train(LineStage(), CONFIG, tmp_path)
    assert (
        len(shown_values) == 3
        and shown_values[-1]["lr"] == f"{learning_rate(CONFIG, 7) * CONFIG.lr:.1e}"
        and float(shown_values[-1]["loss"]) > 0
    )
