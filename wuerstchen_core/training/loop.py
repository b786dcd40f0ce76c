"""The one training loop: accelerate's devices, processes and precision, EMA, exact resume, log and sample sheets."""

from __future__ import annotations

import logging
import math
import time
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, InitProcessGroupKwargs
from torch import Tensor
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from ..common.atomic import remove_drafts, replace_file
from .checkpoint import append_row, read_checkpoint, rows_until, write_checkpoint, write_rows
from .config import LoopConfig
from .ema import EMA, load_into, meta_copy
from .optim import build_optimizers, recompute_blocks
from .rng import StepRandom
from .sharding import like, load_optimizer, whole
from .stage import Stage

log = logging.getLogger(__name__)

FEW = 10  # steps that may have no finite loss, whatever their share, but not in a row
PATIENCE = timedelta(hours=2)  # of the other processes, while the first draws and writes


def learning_rate(config: LoopConfig, step: int) -> float:
    """Share of the rate at a step: warmup, constant, linear decay at the end."""
    warmup = min(1.0, (step + 1) / max(1, config.warmup))
    decay_steps = max(1.0, config.steps * config.decay)
    return min(warmup, max(0.0, (config.steps - step) / decay_steps), 1.0)


def train(stage: Stage[Any], config: LoopConfig, folder: Path) -> Path:
    """Train a stage in `folder`, going on from the checkpoint there; returns the file of its EMA weights.

    What is stopped at any moment goes on from its last checkpoint as if it had never been: same weights, same log.
    Under `accelerate launch` or `torchrun` all processes call this; the first of them writes.
    """
    return _Run(stage, config, folder).train()


def check_setup(accelerator: Accelerator, config: LoopConfig, stage: Stage[Any]) -> None:
    """Raise ValueError where the loop can't do what was asked for."""
    if accelerator.scaler is not None and config.muon_lr:
        raise ValueError("[train] muon_lr does not go with fp16, whose gradients are scaled: set precision to bf16")
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise ValueError("FSDP version 1 can't be saved here: set fsdp_version to 2 in accelerate's configuration")
    if accelerator.distributed_type == DistributedType.FSDP and stage.undivided:
        raise ValueError(f"{stage.undivided} can't be trained by FSDP, which divides weights: train it by DDP")
    there = {str(getattr(tracker, "value", tracker)) for tracker in accelerator.log_with}
    if missing := [name for name in config.trackers if name not in there]:
        raise ValueError(f"[train] trackers: {', '.join(missing)} cannot be imported: install it, or leave it out")
    if (batches := accelerator.gradient_accumulation_steps) != 1:
        raise ValueError(
            f"accelerate is configured to take {batches} batches a step: set that to 1 and [train] accumulate to "
            f"{batches}"
        )


def take_whole(accelerator: Accelerator) -> None:
    """Let FSDP take networks as they are: made again of a state dict alone, as accelerate has it by default, they lose
    what is not in it, such as the weights that a LoRA leaves as they are."""
    if (plugin := getattr(accelerator.state, "fsdp_plugin", None)) is not None:
        plugin.cpu_ram_efficient_loading = False


class _Run:
    """A training as one process sees it."""

    def __init__(self, stage: Stage[Any], config: LoopConfig, folder: Path):
        self.stage, self.config, self.folder = stage, config, folder
        AcceleratorState._reset_state()  # so that an earlier training's precision is not this one's
        self.accelerator = Accelerator(
            mixed_precision=config.precision or None,
            log_with=list(config.trackers) or None,
            project_dir=folder,
            kwargs_handlers=[
                DistributedDataParallelKwargs(find_unused_parameters=stage.idle_weights),
                InitProcessGroupKwargs(timeout=PATIENCE),
            ],
        )
        check_setup(self.accelerator, config, stage)
        self.main = self.accelerator.is_main_process
        folder.mkdir(parents=True, exist_ok=True)
        take_whole(self.accelerator)
        self.bones = meta_copy(stage.net)
        if config.checkpointing:
            recompute_blocks(stage.net)
        optimizers = build_optimizers(stage.net, self.accelerator.device, config.muon_lr)
        self.net, *self.steppers = self.accelerator.prepare(stage.net, *optimizers.values())
        self.optimizers = dict(zip(optimizers, (one.optimizer for one in self.steppers), strict=True))
        self.plain = self.accelerator.unwrap_model(self.net, keep_torch_compile=False)
        self.average = EMA(self.plain, config.ema)
        self.recent: list[Tensor] = []  # losses since the last row of the log
        self.skipped = self.lost = 0  # steps without a finite loss: all, and the last in a row

    def train(self) -> Path:
        config, file = self.config, self.folder / f"{self.stage.name}.safetensors"
        start, before, data = self._resume()
        if start >= config.steps:
            log.info("%s is at step %d already: raise [train] steps, or give another run folder", self.folder, start)
        self._begin(data)
        if config.trackers:
            of = {"tensorboard": {"purge_step": start + 1}}  # what a stopped run wrote beyond its last checkpoint
            self.accelerator.init_trackers(self.stage.name, init_kwargs=of)
        self.net.train()
        progress = tqdm(
            range(start, config.steps), initial=start, total=config.steps, desc=self.stage.name, mininterval=2,
            disable=not self.main,
        )  # fmt: skip
        began = time.monotonic() - before
        for step in progress:
            self._step(step)
            done = step + 1
            log_now, save_now, draw_now = (
                done == config.steps or done % every == 0
                for every in (config.log_every, config.save_every, config.sheet_every)
            )
            if log_now:
                self._log(done, round(time.monotonic() - began, 1), progress)
            if draw_now or save_now:  # last: what an interrupt leaves undone before it is done again
                self._keep(done, file, draw_now, save_now)
        for tracker in self.accelerator.trackers:
            tracker.finish()
        return file

    def _begin(self, data: dict[str, Any]) -> None:
        """Make the stage ready for its first batch, on pictures read up to where `data` says."""
        config, accelerator = self.config, self.accelerator
        for network in self.stage.frozen:
            network.to(accelerator.device)
        self.stage.dataset.start_reading(
            data.get("position", 0), data.get("fingerprint", ""),
            batch=config.batch, seed=config.seed, cache=self.folder,
            rank=accelerator.process_index, world=accelerator.num_processes,
        )  # fmt: skip

    def _step(self, step: int) -> None:
        config, accelerator = self.config, self.accelerator
        processes, rank, size = accelerator.num_processes, accelerator.process_index, config.batch
        for optimizer, name in zip(self.steppers, self.optimizers, strict=True):
            for group in optimizer.param_groups:
                group.update(self._settings(name, step))
        losses, buffers = [], [(x, x.clone()) for x in self.plain.buffers()]
        for turn in range(config.accumulate):
            part = turn * processes + rank
            torch.manual_seed((config.seed * 1_000_003 + step) * processes * config.accumulate + part)  # of dropout
            places = range(part * size, (part + 1) * size)
            rng = StepRandom(config.seed, step, size * processes * config.accumulate, places)
            batch = [_to(item, accelerator.device) for item in self.stage.batch(step, rng)]
            last = turn == config.accumulate - 1
            with nullcontext() if last else accelerator.no_sync(self.net):
                with accelerator.autocast():  # not of the backward pass, in which it would hold on to its weights
                    loss = self.stage.loss(self.net, *batch) / config.accumulate
                accelerator.backward(loss)
            losses.append(loss.detach().float())
        norm = accelerator.clip_grad_norm_(self.net.parameters(), config.clip)
        finite = math.isfinite(float(norm.full_tensor() if isinstance(norm, DTensor) else norm))
        for optimizer in self.steppers:
            if finite or accelerator.scaler is not None:  # fp16's scaler steps over what overflows, and learns from it
                optimizer.step()
            optimizer.zero_grad()
        if finite:
            self.average.update(self.plain, first=step == self.skipped)
            self.recent.append(torch.stack(losses).sum())
            self.lost = 0
        else:
            for x, before in buffers:  # of which batch norms are full of it
                x.copy_(before)
            self._skip(step)

    def _settings(self, name: str, step: int) -> dict[str, Any]:
        """What the configuration says for a step, whatever a checkpoint said before."""
        config, share = self.config, learning_rate(self.config, step)
        if name == "muon":
            return {"lr": config.muon_lr * share, "weight_decay": config.weight_decay}
        return {"lr": config.lr * share, "weight_decay": config.weight_decay, "betas": config.betas}

    def _skip(self, step: int) -> None:
        self.skipped, self.lost = self.skipped + 1, self.lost + 1
        log.warning("step %d of %s is left out: its loss or gradients are not finite", step + 1, self.stage.name)
        lost = f"{self.skipped} of {step + 1} steps of {self.stage.name} had no finite loss or gradients"
        if self.lost == FEW:
            raise ValueError(f"{lost}, {FEW} of them now in a row: lower the rate")
        if self.skipped > max(FEW, self.config.bad_share * (step + 1)):
            raise ValueError(f"{lost}; [train] bad_share = {self.config.bad_share:g} allows no more: lower the rate")

    def _log(self, done: int, seconds: float, progress: tqdm[int]) -> None:
        """The mean loss since the last row, over all processes; no row where none was finite."""
        if not self.recent:
            return
        mean: Tensor = self.accelerator.reduce(torch.stack(self.recent).mean(), reduction="mean")
        self.recent.clear()
        loss, rate = mean.item(), self.optimizers["adamw"].param_groups[0]["lr"]
        progress.set_postfix(loss=f"{loss:.4f}", lr=f"{rate:.1e}")
        self.accelerator.log({"loss": loss, "lr": rate}, step=done)
        if self.main:
            row = {"step": done, "loss": loss, "lr": rate, "seconds": seconds, "skipped": self.skipped}
            append_row(self.folder, row)

    def _keep(self, done: int, file: Path, draw: bool, save: bool) -> None:
        """Draw a sheet, and save the weights and a checkpoint; whichever is due."""
        average = whole(self.average.values, self.main)
        if save:
            weights = whole(self.plain.state_dict(), self.main)
            states = whole({name: one.state_dict() for name, one in self.optimizers.items()}, self.main)
            data = self._read_so_far()
            losses = self.accelerator.reduce(torch.stack(self.recent), "mean").tolist() if self.recent else []
        if self.main:
            net = load_into(self.bones, average).to(self.accelerator.device)
            if draw:
                with torch.no_grad():
                    sample_grid = self.stage.sample_grid(net)
                if sample_grid is not None:
                    replace_file(self.folder / f"sheet-{done:06d}.png", partial(sample_grid.save, format="PNG"))
            if save:
                self.stage.save(file, net, {**self.stage.told, "training": {"step": done}})
                if done == self.config.steps:
                    self.stage.finish(self.folder, net)
                contents = {"step": done, "skipped": self.skipped, "lost": self.lost, "losses": losses}
                contents |= {"data": data, "net": weights, "average": average, "optimizers": states}
                contents |= {"scaler": scaler.state_dict()} if (scaler := self.accelerator.scaler) else {}
                write_checkpoint(self.folder, done, contents, self.config.keep)
        self.accelerator.wait_for_everyone()

    def _read_so_far(self) -> dict[str, Any]:
        """How far the pictures were read: as far as the process that is furthest, where they read streams."""
        position = torch.tensor([self.stage.dataset.position], device=self.accelerator.device)
        furthest = self.accelerator.gather(position).max().item()
        return {"position": furthest, "fingerprint": self.stage.dataset.fingerprint}

    def _resume(self) -> tuple[int, float, dict[str, Any]]:
        """Go on from the checkpoint, if there is one, and drop what the log says beyond it; the step, the seconds that
        training has taken, and how far the pictures were read."""
        contents = read_checkpoint(self.folder, self._take)
        step = contents["step"] if contents else 0
        steps = self.accelerator.gather(torch.tensor([step], device=self.accelerator.device))
        if (steps != step).any():
            raise ValueError(f"{self.folder} is not the same folder for all processes: let all machines share it")
        if contents:
            self.skipped, self.lost = contents["skipped"], contents.get("lost", 0)
            self.recent = list(torch.tensor(contents["losses"], device=self.accelerator.device))
        kept = rows_until(self.folder, step)
        self.accelerator.wait_for_everyone()
        if self.main:
            remove_drafts(self.folder)
            write_rows(self.folder, kept)
        self.accelerator.wait_for_everyone()
        return step, kept[-1]["seconds"] if kept else 0.0, contents["data"] if contents else {}

    def _take(self, contents: dict[str, Any]) -> None:
        own = self.plain.state_dict()
        self.plain.load_state_dict({key: like(x, own[key]) for key, x in contents["net"].items()})
        for name, optimizer in self.optimizers.items():
            load_optimizer(optimizer, contents["optimizers"][name])
        self.average.load(contents["average"])
        if self.accelerator.scaler is not None and "scaler" in contents:
            self.accelerator.scaler.load_state_dict(contents["scaler"])


def _to(item: Any, device: torch.device) -> Any:
    return item.to(device) if isinstance(item, Tensor) else item
