"""The one training loop: accelerate's devices and precision, EMA, exact resume, log, progress and sample sheets."""

from __future__ import annotations

import json
import logging
import math
import os
import pickle
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from ..checkpoints import save_bundle
from .config import LoopConfig

log = logging.getLogger(__name__)


N = TypeVar("N", bound=nn.Module)


class Stage(ABC, Generic[N]):
    """What the loop needs to know of what it trains."""

    name: str
    tables: tuple[str, ...]  # of the configuration, that only this stage reads
    net: N  # everything that learns

    @abstractmethod
    def batch(self, step: int, size: int, rng: torch.Generator) -> tuple[Any, ...]:
        """The batch of a step; all chance comes from `rng`, so that a resumed run sees what it would have seen."""

    @abstractmethod
    def loss(self, net: N, *batch: Any) -> Tensor:
        """The loss of a batch (scalar); `net` is `self.net`, perhaps wrapped."""

    @abstractmethod
    def sheet(self, net: N) -> Image.Image | None:
        """A picture of what `net` (the EMA) can do by now; None if it can't be shown yet."""

    @abstractmethod
    def parts(self, net: N) -> dict[str, nn.Module]:
        """The parts of a bundle that `net` (the EMA) holds."""


def learning_rate(config: LoopConfig, step: int) -> float:
    """Share of the rate at a step: warmup, constant, linear decay at the end."""
    warmup = min(1.0, (step + 1) / max(1, config.warmup))
    decay_steps = max(1.0, config.steps * config.decay)
    return min(warmup, max(0.0, (config.steps - step) / decay_steps), 1.0)


def build_optimizers(net: nn.Module, config: LoopConfig) -> dict[str, torch.optim.Optimizer]:
    """AdamW, and for the matrices of the blocks Muon (kellerjordan.github.io/posts/muon), if `muon_lr` is set."""
    learning = {name: p for name, p in net.named_parameters() if p.requires_grad}
    matrices = {name: p for name, p in learning.items() if config.muon_lr and "blocks." in name and p.ndim == 2}
    optimizers: dict[str, torch.optim.Optimizer] = {
        "adamw": torch.optim.AdamW([p for name, p in learning.items() if name not in matrices])
    }
    if matrices:
        optimizers["muon"] = torch.optim.Muon(list(matrices.values()), adjust_lr_fn="match_rms_adamw")
    return optimizers


def set_rates(optimizers: dict[str, torch.optim.Optimizer], config: LoopConfig, step: int) -> None:
    """Give every optimizer what the configuration says for a step, whatever a checkpoint said before."""
    share, common = learning_rate(config, step), {"weight_decay": config.weight_decay}
    settings: dict[str, dict[str, Any]] = {
        "adamw": {"lr": config.lr * share, "betas": config.betas, **common},
        "muon": {"lr": config.muon_lr * share, **common},
    }
    for name, optimizer in optimizers.items():
        for group in optimizer.param_groups:
            group.update(settings[name])


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file, then put it in place of `path` in one move."""
    temporary = path.with_name(path.name + ".part")
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def train(stage: Stage[Any], config: LoopConfig, folder: Path) -> Path:
    """Train a stage in `folder`, going on from the checkpoint there; returns the file of its EMA weights.

    What is stopped at any moment goes on from its last checkpoint as if it had never been: same weights, same log.
    """
    folder.mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator(mixed_precision=config.precision)
    optimizers = build_optimizers(stage.net, config)
    ema = AveragedModel(stage.net, multi_avg_fn=get_ema_multi_avg_fn(config.ema), use_buffers=True)
    state = {"net": stage.net, "ema": ema, **optimizers}
    start, losses, seconds = _resume(folder, state)
    net, *steppers = accelerator.prepare(stage.net, *optimizers.values())
    net.train()
    progress = tqdm(range(start, config.steps), initial=start, total=config.steps, desc=stage.name, mininterval=2)
    recent = list(torch.tensor(losses, device=accelerator.device))  # since the last row of the log
    began = time.monotonic() - seconds
    for step in progress:
        set_rates(optimizers, config, step)
        torch.manual_seed(config.seed * 1_000_003 + step)  # of dropout
        rng = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
        batch = [_to(item, accelerator.device) for item in stage.batch(step, config.batch, rng)]
        with accelerator.autocast():
            loss = stage.loss(net, *batch)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(net.parameters(), config.clip)
        for optimizer in steppers:
            optimizer.step()
            optimizer.zero_grad()
        ema.update_parameters(accelerator.unwrap_model(net))
        recent.append(loss.detach().float())
        done = step + 1
        log_now, save_now, draw_now = (
            done == config.steps or done % every == 0
            for every in (config.log_every, config.save_every, config.sheet_every)
        )
        if log_now or save_now:
            mean = torch.stack(recent).mean().item()
            if not math.isfinite(mean):  # nor may such weights replace the last good checkpoint
                raise ValueError(f"the loss of {stage.name} is {mean} at step {done}: lower the learning rate")
        if log_now:
            recent.clear()
            rate = optimizers["adamw"].param_groups[0]["lr"]
            progress.set_postfix(loss=f"{mean:.4f}", lr=f"{rate:.1e}")
            seconds = round(time.monotonic() - began, 1)
            _append(folder / "log.jsonl", {"step": done, "loss": mean, "lr": rate, "seconds": seconds})
        if draw_now:
            _draw_sheet(stage, ema, folder, done)
        if save_now:  # last: what an interrupt leaves undone before it is done again
            save_bundle(folder / f"{stage.name}.safetensors", stage.parts(ema.module), {"training": {"step": done}})
            contents = {"step": done, "losses": [value.item() for value in recent]}
            contents |= {name: item.state_dict() for name, item in state.items()}
            replace_file(folder / "checkpoint.pt", partial(torch.save, contents))
    return folder / f"{stage.name}.safetensors"


def _to(item: Any, device: torch.device) -> Any:
    return item.to(device) if isinstance(item, Tensor) else item


def _append(path: Path, row: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def _resume(folder: Path, state: dict[str, Any]) -> tuple[int, list[float], float]:
    """Load the checkpoint, if there is one, and drop what the log says beyond it.

    Returns its step, the losses since the last row of the log, and the seconds that training has taken.
    """
    path, step, losses = folder / "checkpoint.pt", 0, []
    if path.exists():
        try:
            contents = torch.load(path, map_location="cpu", weights_only=True)
            for name, item in state.items():
                item.load_state_dict(contents[name])
        except (RuntimeError, ValueError, LookupError, EOFError, pickle.UnpicklingError) as error:
            raise ValueError(
                f"{path} is damaged or of a network of other sizes: restore [model], or choose another run folder"
            ) from error
        step, losses = contents["step"], contents.get("losses", [])
        log.info("going on from step %d of %s", step, path)
    kept = [row for row in _rows(folder / "log.jsonl") if row["step"] <= step]
    text = "".join(f"{json.dumps(row)}\n" for row in kept)
    replace_file(folder / "log.jsonl", lambda part: part.write_text(text, encoding="utf-8"))
    return step, losses, kept[-1]["seconds"] if kept else 0.0


def _rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a log, without a last one that an interrupt cut short."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _draw_sheet(stage: Stage[Any], ema: AveragedModel, folder: Path, step: int) -> None:
    was_training = ema.module.training
    ema.module.eval()
    with torch.no_grad():
        sheet = stage.sheet(ema.module)
    ema.module.train(was_training)
    if sheet is not None:
        replace_file(folder / f"sheet-{step:06d}.png", partial(sheet.save, format="PNG"))
