"""The one training loop: accelerate's devices and precision, EMA, exact resume, log, progress and sample sheets."""

from __future__ import annotations

import json
import logging
import os
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from ..checkpoints import save_bundle
from .config import LoopConfig

log = logging.getLogger(__name__)


N = TypeVar("N", bound=nn.Module)


class Stage(ABC, Generic[N]):
    """What the loop needs to know of what it trains."""

    name: str
    net: N  # everything that learns

    @abstractmethod
    def batch(self, size: int, rng: torch.Generator) -> tuple[Any, ...]:
        """One batch; all chance comes from `rng`, so that a resumed run sees what it would have seen."""

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


def replace_file(path: Path, write: Any) -> None:
    """Let `write` fill a temporary file, then put it in place of `path` in one move."""
    temporary = path.with_name(path.name + ".part")
    write(temporary)
    os.replace(temporary, path)


def train(stage: Stage[Any], config: LoopConfig, folder: Path) -> Path:
    """Train a stage in `folder`, going on from the checkpoint there; returns the file of its EMA weights."""
    folder.mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator(mixed_precision=config.precision)
    settings: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "weight_decay": config.weight_decay}
    optimizer = torch.optim.AdamW([p for p in stage.net.parameters() if p.requires_grad], **settings)
    schedule = LambdaLR(optimizer, lambda step: learning_rate(config, step))
    ema = AveragedModel(stage.net, multi_avg_fn=get_ema_multi_avg_fn(config.ema), use_buffers=True)
    state = {"net": stage.net, "ema": ema, "optimizer": optimizer, "schedule": schedule}
    start = _resume(folder, state)
    for group in optimizer.param_groups:  # a configuration that was changed meanwhile wins over the checkpoint
        group.update(settings, lr=group["lr"], initial_lr=config.lr)
    schedule.base_lrs = [config.lr] * len(optimizer.param_groups)
    net, optimizer, schedule = accelerator.prepare(stage.net, optimizer, schedule)
    net.train()
    progress = tqdm(range(start, config.steps), initial=start, total=config.steps, desc=stage.name, mininterval=2)
    recent: list[Tensor] = []
    began = time.monotonic()
    for step in progress:
        torch.manual_seed(config.seed * 1_000_003 + step)  # of dropout
        rng = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
        batch = [_to(item, accelerator.device) for item in stage.batch(config.batch, rng)]
        with accelerator.autocast():
            loss = stage.loss(net, *batch)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(net.parameters(), config.clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        ema.update_parameters(accelerator.unwrap_model(net))
        recent.append(loss.detach())
        done = step + 1
        if done % config.log_every == 0 or done == config.steps:
            mean = torch.stack(recent).mean().item()
            if mean != mean:
                raise ValueError(f"the loss of {stage.name} is not a number at step {done}: lower the learning rate")
            recent.clear()
            rate = schedule.get_last_lr()[0]
            progress.set_postfix(loss=f"{mean:.4f}", lr=f"{rate:.1e}")
            seconds = round(time.monotonic() - began, 1)
            _append(folder / "log.jsonl", {"step": done, "loss": mean, "lr": rate, "seconds": seconds})
        if done % config.save_every == 0 or done == config.steps:
            _save(stage, state, ema, folder, done)
        if done % config.sheet_every == 0 or done == config.steps:
            _draw_sheet(stage, ema, folder, done)
    return folder / f"{stage.name}.safetensors"


def _to(item: Any, device: torch.device) -> Any:
    return item.to(device) if isinstance(item, Tensor) else item


def _append(path: Path, row: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def _save(stage: Stage[Any], state: dict[str, Any], ema: AveragedModel, folder: Path, step: int) -> None:
    contents = {"step": step, **{name: item.state_dict() for name, item in state.items()}}
    replace_file(folder / "checkpoint.pt", lambda path: torch.save(contents, path))
    parts = stage.parts(ema.module)
    save_bundle(folder / f"{stage.name}.safetensors", parts, {"training": {"step": step}}, dtype=None)


def _resume(folder: Path, state: dict[str, Any]) -> int:
    """Load the checkpoint, if there is one, drop what the log says beyond it, and return its step."""
    path = folder / "checkpoint.pt"
    if not path.exists():
        return 0
    contents = torch.load(path, weights_only=True)
    for name, item in state.items():
        item.load_state_dict(contents[name])
    step: int = contents["step"]
    rows = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines() if (folder / "log.jsonl").exists() else []
    kept = [row for row in rows if json.loads(row)["step"] <= step]
    replace_file(folder / "log.jsonl", lambda part: part.write_text("".join(f"{row}\n" for row in kept)))
    log.info("going on from step %d of %s", step, path)
    return step


def _draw_sheet(stage: Stage[Any], ema: AveragedModel, folder: Path, step: int) -> None:
    was_training = ema.module.training
    ema.module.eval()
    with torch.no_grad():
        sheet = stage.sheet(ema.module)
    ema.module.train(was_training)
    if sheet is not None:
        sheet.save(folder / f"sheet-{step:06d}.png")
