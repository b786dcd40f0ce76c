"""The training loop of all stages: devices, processes and precision by accelerate; EMA, exact resume, log, samples."""

from __future__ import annotations

import logging
import math
import time
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import Tensor
from torch.distributed.tensor import DTensor
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from ..checkpoints.diffusers_layout import is_in_diffusers, save_component
from ..common.atomic import check_room, link_file, remove_drafts
from .checkpoint import (
    append_row,
    newest_step,
    read_checkpoint,
    record_weights,
    remove_old,
    space_needed,
    truncate_log,
    weights_name,
    write_checkpoint,
)
from .config import LoopConfig
from .monitor import Monitor
from .processes import check_processes, configure
from .progress import interruptible, left_out
from .rates import learning_rate
from .reconstruction import check_reconstruction
from .report import StepTimes, report_start
from .rng import StepRandom
from .stage import Stage
from .stages.networks import weights_metadata
from .state import TrainState

log = logging.getLogger(__name__)

MAX_SKIPPED = 10  # skipped steps that are allowed whatever bad_share is; as many in a row stop the run
TIMEOUT = timedelta(hours=2)  # how long other processes wait for the main process, which generates samples and writes


def train(stage: Stage[Any], config: LoopConfig, folder: Path) -> Path:
    """Trains a stage, from the newest checkpoint in `folder` if there is one; returns the file of its EMA weights.

    A run that was stopped at any moment and started again gives the weights and the log of an uninterrupted one. Under
    `accelerate launch` or `torchrun` all processes call this; the main process writes the files.
    """
    return _Run(stage, config, folder).train()


class _Run:
    """One process of a training run."""

    def __init__(self, stage: Stage[Any], config: LoopConfig, folder: Path):
        self.stage, self.config, self.folder = stage, config, folder
        self.metadata = weights_metadata(stage)
        AcceleratorState._reset_state()  # an earlier run in this process may have set another precision
        self.accelerator = Accelerator(
            mixed_precision=config.precision or None,
            log_with=list(config.trackers) or None,
            project_dir=folder,
            kwargs_handlers=[
                DistributedDataParallelKwargs(find_unused_parameters=stage.unused_weights),
                InitProcessGroupKwargs(timeout=TIMEOUT),
            ],
        )
        check_processes(self.accelerator)
        configure(self.accelerator, config, stage)
        self.main = self.accelerator.is_main_process
        folder.mkdir(parents=True, exist_ok=True)
        self.state = TrainState(stage.net, config, self.accelerator)
        self.monitor = Monitor(stage, config, folder, self.accelerator)
        self.losses: list[Tensor] = []  # since the last row of the log
        self.skipped = self.skipped_in_row = 0  # steps without a finite loss

    def train(self) -> Path:
        config, file = self.config, self.folder / f"{self.stage.stem}.safetensors"
        newest = newest_step(self.folder)
        if self.main:
            remove_drafts(self.folder)
            if newest < config.steps:
                check_room(self.folder, space_needed(file, config, newest, *self.state.file_sizes()))
        if self.monitor.compares and newest < config.steps:
            _, net = self.state.averaged()
            if self.main:
                self.monitor.base = self.monitor.generate(net, start=True)
        start, seconds, data = self._resume()
        if start >= config.steps:
            log.info("%s is at step %d already: raise [train] steps, or choose another run folder", self.folder, start)
        for network in self.stage.frozen:
            network.to(self.accelerator.device)
        self.stage.dataset.start_reading(
            data.get("position", 0), data.get("fingerprint", ""),
            batch=config.batch, seed=config.seed, cache=self.folder,
            rank=self.accelerator.process_index, world=self.accelerator.num_processes,
        )  # fmt: skip
        if config.trackers:
            options = {"tensorboard": {"purge_step": start + 1}}  # drops rows after the checkpoint to resume from
            self.accelerator.init_trackers(self.stage.name, init_kwargs=options)
        if self.main:
            self.monitor.missing(self.stage.dataset.missing_previews())
        if self.main and start < config.steps:
            report_start(self.stage, config, start, self.accelerator.num_processes)
            if not start:
                check_reconstruction(self.stage, self.state.unwrapped, self.folder)
        if start == 0 and self.monitor.due(0):
            self._save(0, file, sample=True)
        self.state.net.train()
        with logging_redirect_tqdm() if self.main else nullcontext():  # log lines go above the bar
            self._steps(start, seconds, file)
        for tracker in self.accelerator.trackers:
            tracker.finish()
        return file

    def _steps(self, start: int, seconds: float, file: Path) -> None:
        """Trains from step `start` to the end, after `seconds` of training."""
        config, times = self.config, StepTimes(start, self.config.steps, self.accelerator.device)
        options: dict[str, Any] = {"initial": start, "total": config.steps, "disable": not self.main}
        began = time.monotonic() - seconds
        progress = tqdm(desc=self.stage.name, mininterval=2, **options)
        with interruptible(progress, self.folder):
            for step in range(start, config.steps):
                self._step(step)
                progress.update()
                done = step + 1
                if self.main:
                    times.done(done)
                log_due, save_due = (
                    done == config.steps or done % x == 0 for x in (config.log_every, config.save_every)
                )
                keep_due = config.keep_every > 0 and done % config.keep_every == 0
                if log_due:
                    self._log(done, round(time.monotonic() - began, 1), progress)
                if (sample_due := self.monitor.due(done)) or save_due or keep_due:
                    with left_out(progress, times):
                        self._save(done, file, sample_due, save_due, keep_due)

    def _step(self, step: int) -> None:
        config, accelerator = self.config, self.accelerator
        processes, rank, size = accelerator.num_processes, accelerator.process_index, config.batch
        self.state.set_rates(learning_rate(config, step))  # at every step, since a checkpoint restores its own
        losses, buffers = [], [(x, x.clone()) for x in self.state.unwrapped.buffers()]
        for turn in range(config.accumulate):
            part = turn * processes + rank
            torch.manual_seed((config.seed * 1_000_003 + step) * processes * config.accumulate + part)  # for dropout
            indices = range(part * size, (part + 1) * size)
            rng = StepRandom(config.seed, step, size * processes * config.accumulate, indices)
            batch = [x.to(accelerator.device) if isinstance(x, Tensor) else x for x in self.stage.batch(step, rng)]
            last = turn == config.accumulate - 1
            with nullcontext() if last else accelerator.no_sync(self.state.net):
                with accelerator.autocast():  # not around backward, where it would keep the converted weights
                    loss = self.stage.loss(self.state.net, *batch) / config.accumulate
                accelerator.backward(loss)
            losses.append(loss.detach().float())
        norm = accelerator.clip_grad_norm_(self.state.net.parameters(), config.clip)
        finite = math.isfinite(float(norm.full_tensor() if isinstance(norm, DTensor) else norm))
        for optimizer in self.state.optimizers.values():
            if finite or accelerator.scaler is not None:  # fp16's scaler skips overflows and adapts its scale
                optimizer.step()
            optimizer.zero_grad()
        if finite:
            self.state.ema.update(self.state.unwrapped, first=step == self.skipped)  # all earlier steps were skipped
            self.losses.append(torch.stack(losses).sum())
            self.skipped_in_row = 0
        else:
            for x, before in buffers:  # batch norms have added the batch's statistics to theirs
                x.copy_(before)
            self._skip(step)

    def _skip(self, step: int) -> None:
        """Counts and logs a skipped step. ValueError if there are too many."""
        self.skipped, self.skipped_in_row = self.skipped + 1, self.skipped_in_row + 1
        name, limit = self.stage.name, self.config.bad_share
        log.warning("%s: step %d is skipped, since its loss or gradients are not finite", name, step + 1)
        message = f"{name}: {self.skipped} of {step + 1} steps had no finite loss or gradients"
        if self.skipped_in_row == MAX_SKIPPED:
            raise ValueError(f"{message}, the last {MAX_SKIPPED} in a row: lower [train] lr")
        if self.skipped > max(MAX_SKIPPED, limit * (step + 1)):
            raise ValueError(f"{message}, more than [train] bad_share = {limit:g} allows: lower [train] lr")

    def _log(self, done: int, seconds: float, progress: tqdm[int]) -> None:
        """Logs the mean loss since the last row over all processes; no row if every step was skipped."""
        if not self.losses:
            return
        mean: Tensor = self.accelerator.reduce(torch.stack(self.losses).mean(), reduction="mean")
        self.losses.clear()
        loss, rate = mean.item(), self.state.rate
        progress.set_postfix(loss=f"{loss:.4f}", lr=f"{rate:.1e}")
        self.accelerator.log({"loss": loss, "lr": rate}, step=done)
        if self.main:
            row = {"step": done, "loss": loss, "lr": rate, "seconds": seconds, "skipped": self.skipped}
            append_row(self.folder, row)

    def _save(self, done: int, file: Path, sample: bool, checkpoint: bool = False, keep: bool = False) -> None:
        """Writes sample grids, weights that are kept, or the weights and a checkpoint. The checkpoint comes last.

        So if this is interrupted, the resumed run repeats the step and writes all files.
        """
        ema, net = self.state.averaged()
        if checkpoint:
            trained = self.state.state_dict()
            # Processes read streams at different speeds; all resume from the furthest position.
            position = torch.tensor([self.stage.dataset.position], device=self.accelerator.device)
            furthest = self.accelerator.gather(position).max().item()
            data = {"position": furthest, "fingerprint": self.stage.dataset.fingerprint}
            losses = self.accelerator.reduce(torch.stack(self.losses), "mean").tolist() if self.losses else []
        if self.main:
            kept = [self.folder / weights_name(self.stage.stem, done)] if keep else []
            for path in [*kept, *([file] if checkpoint else [])]:
                self.stage.save(path, net, {**self.metadata, "training": {"step": done}})
            for path in kept:
                record_weights(path, done)
            if checkpoint:
                part, network = self.stage.part, getattr(net, self.stage.part, net)
                if done == self.config.steps and is_in_diffusers(part, network):
                    save_component(self.folder / "diffusers" / part, part, network, self.metadata)
            if sample:
                self.monitor.write(done, net)
            if (preview := file.with_suffix(".png")).exists():
                for path in kept:
                    link_file(preview, path.with_suffix(".png"))
            if checkpoint:
                contents = {"step": done, "skipped": self.skipped, "lost": self.skipped_in_row, "losses": losses}
                contents |= {"data": data, "average": ema, **trained}
                write_checkpoint(self.folder, done, contents, self.config.keep)
        self.accelerator.wait_for_everyone()

    def _resume(self) -> tuple[int, float, dict[str, Any]]:
        """Loads the newest checkpoint, if any, and removes later rows of the log.

        Returns the step, the seconds of training so far (in the main process) and the position in the data.
        """
        contents = read_checkpoint(self.folder, self.state.load_state_dict)
        step = contents["step"] if contents else 0
        steps = self.accelerator.gather(torch.tensor([step], device=self.accelerator.device))
        if (steps != step).any():
            raise ValueError(f"{self.folder} differs between processes: choose a run folder that all machines share")
        if contents:
            self.skipped, self.skipped_in_row = contents["skipped"], contents["lost"]
            self.losses = list(torch.tensor(contents["losses"], device=self.accelerator.device))
        seconds = 0.0
        if self.main:
            remove_old(self.folder, self.config.keep)
            seconds = truncate_log(self.folder, step if contents else -1)
        self.accelerator.wait_for_everyone()
        return step, seconds, contents["data"] if contents else {}
