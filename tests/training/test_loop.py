"""The training loop with the smallest network."""

from __future__ import annotations

import math
import shutil
import sys
from contextlib import nullcontext
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.recording_trainer import CONFIG, LineStage, file_names
from helpers.tiny_stages import assert_equal_states, checkpoint, ema_of, log_rows, read_log
from PIL import Image
from torch import Tensor

from wuerstchen_core.models.prior import Prior, PriorParams
from wuerstchen_core.training import loop
from wuerstchen_core.training.checkpoint import LOG, append_row, checkpoints, read_rows
from wuerstchen_core.training.loop import learning_rate, train
from wuerstchen_core.training.optim import build_optimizers


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of eight steps."""
    folder = tmp_path_factory.mktemp("whole")
    assert train(LineStage(), CONFIG, folder) == folder / "prior.safetensors"
    return folder


def test_a_run_folder(whole: Path) -> None:
    names = {
        "checkpoint-00000004.pt",
        "checkpoint-00000008.pt",
        "diffusers",
        "log.jsonl",
        "prior.safetensors",
        "run.html",
        "sheet-000004.png",
        "sheet-000008.png",
    }
    assert file_names(whole) == names
    rows = read_log(whole)
    assert [row["step"] for row in rows] == [3, 6, 8]
    assert all(set(row) == {"step", "loss", "lr", "seconds", "skipped"} for row in rows)
    with Image.open(whole / "sheet-000008.png") as grid:
        assert grid.format == "PNG" and grid.getpixel((0, 0)) == (1, 2, 3)


def test_the_ema_is_the_moving_average(tmp_path: Path) -> None:
    """The EMA of weights and buffers equals the average of their values after every step."""
    config = replace(CONFIG, save_every=1)
    states: list[dict[str, Tensor]] = []
    for step in range(1, 9):
        with nullcontext() if step == 8 else pytest.raises(KeyboardInterrupt):
            train(LineStage(stop=2), config, tmp_path)
        states.append(checkpoint(tmp_path)["net"])
        assert checkpoint(tmp_path)["step"] == step
    ema = states[0]
    for weights in states[1:]:
        ema = {key: 0.8 * ema[key] + 0.2 * weights[key] for key in ema}
    for key, value in ema_of(tmp_path).items():
        torch.testing.assert_close(value, ema[key], rtol=0, atol=1e-6)
    assert not torch.allclose(ema["layer.weight"], states[-1]["layer.weight"], atol=1e-4)


@pytest.mark.parametrize("stop", [None, 2])
def test_the_ema_starts_as_the_weights_after_skipped_steps(tmp_path: Path, stop: int | None) -> None:
    """The first finite step copies the weights, also if the run is resumed just before it."""
    config = replace(CONFIG, steps=2, save_every=1)
    if stop is not None:
        with pytest.raises(KeyboardInterrupt):
            train(LineStage(nan_at=[1], stop=stop), config, tmp_path)
    train(LineStage(nan_at=[1] if stop is None else []), config, tmp_path)
    assert checkpoint(tmp_path)["skipped"] == 1
    assert_equal_states(ema_of(tmp_path), checkpoint(tmp_path)["net"])
    assert not torch.equal(ema_of(tmp_path)["layer.weight"], LineStage().net.layer.weight)


def test_the_learning_rate_has_warmup_and_decay() -> None:
    config = replace(CONFIG, steps=100, warmup=10, decay=0.2)
    rates = [learning_rate(config, step) for step in range(101)]
    assert rates[0] == 0.1 and rates[4] == 0.5 and rates[9:81] == [1.0] * 72
    assert rates[90] == 0.5 and rates[99] == pytest.approx(0.05) and rates[100] == 0
    assert rates[:10] == sorted(rates[:10]) and rates[80:] == sorted(rates[80:], reverse=True)
    constant = replace(config, warmup=0, decay=0.0)
    assert [learning_rate(constant, step) for step in range(100)] == [1.0] * 100


def test_a_step_without_a_finite_loss_is_skipped_and_counted(tmp_path: Path, whole: Path) -> None:
    train(LineStage(nan_at=[6]), CONFIG, tmp_path)
    assert [row["skipped"] for row in read_log(tmp_path)] == [0, 1, 1]
    assert all(math.isfinite(row["loss"]) for row in read_log(tmp_path))
    assert all(x.isfinite().all() for x in ema_of(tmp_path).values())
    assert log_rows(tmp_path)[0] == log_rows(whole)[0]
    assert not torch.equal(checkpoint(tmp_path)["net"]["layer.weight"], checkpoint(whole)["net"]["layer.weight"])


def test_too_many_skipped_steps_stop_the_run(tmp_path: Path) -> None:
    config = replace(CONFIG, steps=40, log_every=5, save_every=5)
    for name, nan_at, facts in (
        ("row", range(12, 100), "10 of 21 .*10 in a row"),
        ("half", range(2, 100, 2), r"11 of 22 .*bad_share = 0\.05"),
    ):
        with pytest.raises(ValueError, match=facts):
            train(LineStage(nan_at=nan_at), config, tmp_path / name)
        assert all(x.isfinite().all() for x in ema_of(tmp_path / name).values())
    assert [row["step"] for row in read_log(tmp_path / "row")] == [5, 10, 15]
    assert checkpoint(tmp_path / "row")["step"] == checkpoint(tmp_path / "half")["step"] == 20


def test_a_resumed_run_keeps_counting_skipped_steps_in_a_row(tmp_path: Path) -> None:
    config = replace(CONFIG, steps=40, save_every=5)
    with pytest.raises(KeyboardInterrupt):
        train(LineStage(nan_at=range(8, 100), stop=14), config, tmp_path)  # steps 8 to 10 are skipped
    with pytest.raises(ValueError, match="10 of 17 .*10 in a row"):
        train(LineStage(nan_at=range(1, 100)), config, tmp_path)


def test_fsdp_is_configured_or_refused() -> None:
    stage = LineStage()
    accelerator = SimpleNamespace(
        scaler=None, distributed_type="FSDP", is_fsdp2=True, log_with=[], gradient_accumulation_steps=1,
        state=SimpleNamespace(fsdp_plugin=SimpleNamespace(cpu_ram_efficient_loading=True)),
    )  # fmt: skip
    loop.configure(accelerator, CONFIG, stage)
    assert not accelerator.state.fsdp_plugin.cpu_ram_efficient_loading
    stage.fsdp_conflict = "the codebook"
    with pytest.raises(ValueError, match="the codebook .*FSDP"):
        loop.configure(accelerator, CONFIG, stage)
    accelerator.is_fsdp2 = False
    with pytest.raises(ValueError, match="fsdp_version"):
        loop.configure(accelerator, CONFIG, stage)


def test_an_older_torch_without_muon_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.optim, "Muon")
    net = Prior(PriorParams(c=64, c_cond=16, depth=1, nhead=1))
    with pytest.raises(ValueError, match=r"torch .*Muon.*muon_lr"):
        build_optimizers(net, torch.device("cpu"), 1e-3)
    assert list(build_optimizers(net, torch.device("cpu"))) == ["adamw"]


def test_a_finished_run_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(LineStage(), CONFIG, tmp_path)
    with caplog.at_level("INFO"):
        train(LineStage(), CONFIG, tmp_path)
    assert f"{tmp_path} is at step {CONFIG.steps}" in caplog.text


def test_a_nan_batch_changes_neither_weights_nor_buffers(tmp_path: Path) -> None:
    """Buffers change in the forward pass, before the loss is known."""
    train(LineStage(nan_at=[3]), CONFIG, tmp_path)
    assert all(x.isfinite().all() for key in ("net", "average") for x in checkpoint(tmp_path)[key].values())
    assert checkpoint(tmp_path)["skipped"] == 1


def test_old_checkpoints_are_removed_only_after_a_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(CONFIG, save_every=1, keep=3)
    train(LineStage(), config, tmp_path)
    assert [path.name for path in checkpoints(tmp_path)] == [f"checkpoint-0000000{step}.pt" for step in (8, 7, 6)]

    def full(*_: object) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")  # as on a full disk

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(OSError, match=r"checkpoint-00000009\.pt .*disk"):
            train(LineStage(), replace(config, steps=12), tmp_path)
    assert [path.name for path in checkpoints(tmp_path)] == [f"checkpoint-0000000{step}.pt" for step in (8, 7, 6)]


@pytest.mark.skipif(sys.platform == "win32", reason="no limits on the sizes of files")
def test_a_full_disk_leaves_the_last_checkpoint(tmp_path: Path, whole: Path) -> None:
    import resource

    config = replace(CONFIG, save_every=1, sheet_every=8)  # no grid or page that is larger than a checkpoint
    train(LineStage(), replace(config, steps=3), tmp_path)
    room, (soft, hard) = checkpoints(whole)[0].stat().st_size // 2, resource.getrlimit(resource.RLIMIT_FSIZE)
    before = {path.name: path.read_bytes() for path in checkpoints(tmp_path)}
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        with pytest.raises(OSError, match=r"checkpoint-00000004\.pt .*disk"):
            train(LineStage(), config, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path.name: path.read_bytes() for path in checkpoints(tmp_path)} == before
    train(LineStage(), config, tmp_path)
    assert_equal_states(checkpoint(tmp_path)["net"], checkpoint(whole)["net"])


def test_room_for_all_files_is_found_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, folder = replace(CONFIG, keep=2, keep_every=2, save_every=1), tmp_path / "it"
    asked: list[int] = []
    monkeypatch.setattr(loop, "check_room", lambda path, size: asked.append(size))
    train(LineStage(width=100_000), replace(config, steps=1), folder)
    train(LineStage(width=100_000), config, folder)
    checkpoint, weights = (path.stat().st_size for path in (checkpoints(folder)[0], folder / "prior.safetensors"))
    assert asked == [  # 1: a checkpoint, weights and their draft; 2: two checkpoints more, four kept weights, a draft
        pytest.approx(size, rel=0.02) for size in (checkpoint + 2 * weights, 2 * checkpoint + 5 * weights)
    ]
    monkeypatch.undo()
    monkeypatch.setattr("shutil.disk_usage", lambda path: (10**12, 0, 11_000_000))
    with pytest.raises(OSError, match="new"):
        train(LineStage(width=100_000), config, tmp_path / "new")
    assert not file_names(tmp_path / "new")


def test_accumulated_batches_equal_one_large_batch(tmp_path: Path) -> None:
    for name, change in (("one", {"batch": 4}), ("four", {"batch": 1, "accumulate": 4})):
        train(LineStage(dropout=0.0), replace(CONFIG, **change), tmp_path / name)
    one, four = (checkpoint(tmp_path / name)["net"] for name in ("one", "four"))
    torch.testing.assert_close(one["layer.weight"], four["layer.weight"], rtol=1e-6, atol=1e-6)


def test_a_damaged_or_mismatched_checkpoint_is_named(tmp_path: Path, whole: Path) -> None:
    folder = shutil.copytree(whole, tmp_path / "run")
    facts = r"checkpoint-00000008\.pt .*\[model\].*muon_lr"
    with pytest.raises(ValueError, match=facts):
        train(LineStage(width=5), CONFIG, folder)
    newest = folder / "checkpoint-00000008.pt"
    whole_file = newest.read_bytes()
    for content in (whole_file[: len(whole_file) // 2], b"", b"no checkpoint", b"\x80\x02"):
        newest.write_bytes(content)
        with pytest.raises(ValueError, match=facts):
            train(LineStage(), CONFIG, folder)
    assert log_rows(folder) == log_rows(whole)


def test_the_network_is_in_training_mode_after_samples(whole: Path, tmp_path: Path) -> None:
    stage = LineStage()
    train(stage, CONFIG, tmp_path)
    assert stage.train_modes == [True] * 8


def test_progress_is_shown_with_loss_and_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown_values: list[dict[str, str]] = []
    monkeypatch.setattr(loop.tqdm, "set_postfix", lambda self, **values: shown_values.append(values))
    train(LineStage(), CONFIG, tmp_path)
    assert len(shown_values) == 3 and float(shown_values[-1]["loss"]) > 0
    assert shown_values[-1]["lr"] == f"{learning_rate(CONFIG, 7) * CONFIG.lr:.1e}"


def test_gradients_are_clipped(tmp_path: Path) -> None:
    """Gradients clipped to far below AdamW's epsilon hardly move the weights."""
    train(LineStage(), replace(CONFIG, clip=1e-12, weight_decay=0.0), tmp_path)
    start, end = LineStage().net.layer.bias, checkpoint(tmp_path)["net"]["layer.bias"]
    torch.testing.assert_close(end, start.detach(), rtol=0, atol=1e-3)  # without clipping it moves by 0.1


def test_accelerates_own_accumulation_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop accumulates itself; accelerate would only divide the gradients once more."""
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    with pytest.raises(ValueError, match=r"accelerate .*4.*\[train\] accumulate"):
        train(LineStage(), CONFIG, tmp_path)


def test_tensorboard_gets_the_log_of_a_resumed_run(tmp_path: Path, whole: Path) -> None:
    """Steps that were logged after the last checkpoint do not appear twice."""
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = replace(CONFIG, trackers=("tensorboard",), log_every=1)
    with pytest.raises(KeyboardInterrupt):
        train(LineStage(stop=7), config, tmp_path)
    train(LineStage(), config, tmp_path)
    [folder] = {path.parent for path in tmp_path.rglob("events.out.tfevents.*")}
    seen = events.EventAccumulator(str(folder)).Reload()
    rows = read_log(tmp_path)
    assert [row["step"] for row in rows] == list(range(1, 9))
    for name in ("loss", "lr"):
        shown_values = [(event.step, event.value) for event in seen.Scalars(name)]
        assert shown_values == [(row["step"], pytest.approx(row[name])) for row in rows]
    shown_grids = seen.Images("sheet")
    assert [event.step for event in shown_grids] == [4, 8]
    with Image.open(BytesIO(shown_grids[1].encoded_image_string)) as grid:
        assert grid.size == Image.open(tmp_path / "sheet-000008.png").size and grid.getpixel((0, 0)) == (1, 2, 3)


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        ({"precision": "fp16", "muon_lr": 0.1}, "muon_lr .*fp16"),
        ({"trackers": ("tensorboard", "nobody")}, "nobody"),
        ({"checkpointing": True}, "checkpointing"),
    ],
)
def test_unsupported_settings_are_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], facts: str
) -> None:
    if "precision" in change:  # accelerate creates a scaler on GPUs only
        monkeypatch.setattr(loop, "Accelerator", lambda **_: SimpleNamespace(scaler=object(), num_processes=1))
    with pytest.raises(ValueError, match=facts):
        train(LineStage(), replace(CONFIG, **change), tmp_path)
    assert not list(tmp_path.glob("*.pt"))


def test_a_row_replaces_an_incomplete_one(tmp_path: Path) -> None:
    for step in range(3):
        append_row(tmp_path, {"step": step})
        with (tmp_path / LOG).open("a") as file:
            file.write('{"ste' if step else "")
    assert [row["step"] for row in read_rows(tmp_path / LOG)] == [0, 1, 2]


def test_drafts_of_a_killed_run_are_removed_before_the_disk_is_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draft = tmp_path / ".checkpoint-00000002.pt.abc-1-2.part"
    draft.touch()
    seen: list[bool] = []
    monkeypatch.setattr(loop, "check_room", lambda path, size: seen.append(draft.exists()))
    train(LineStage(), replace(CONFIG, steps=1), tmp_path)
    assert seen == [False]
