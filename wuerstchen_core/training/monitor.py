"""Reports the progress of a run: sample grids and validation losses in its folder and in its trackers."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import nn

from ..common.atomic import replace_file
from ..common.geometry import nearest_legal
from ..inference.images import to_pictures
from ..inference.pipeline import WuerstchenPipeline
from .checkpoint import append_row, read_log
from .config import LoopConfig
from .page import write_page
from .sample_grid import prompt_grid, sample_grid, write_grid
from .samples import generate_samples
from .stage import Stage
from .stages.networks import base_metadata
from .validation import rise, validation_loss

log = logging.getLogger(__name__)


class Monitor:
    """Writes what is due after a step, in the main process."""

    def __init__(self, stage: Stage[Any], config: LoopConfig, folder: Path, accelerator: Accelerator):
        self.stage, self.config, self.folder, self.accelerator = stage, config, folder, accelerator
        self.base: Sequence[Image.Image] = ()  # samples of the model that training starts from
        self._warned: set[str] = set()

    @property
    def compares(self) -> bool:
        """True if sample grids show the model that training starts from too: `base` is to be set before training."""
        return bool(self.stage.sample.prompts and self.stage.bases)

    def due(self, done: int) -> bool:
        """True if `write` has something to write after `done` steps."""
        return self._sheet_due(done) or self._samples_due(done) or self._validation_due(done)

    def write(self, done: int, net: nn.Module) -> None:
        """Writes what is due, and the run's page. `net` has the averaged weights."""
        if self._validation_due(done):
            self._validate(done, net)
        if self._sheet_due(done) and not self.missing(self.stage.dataset.missing_previews()):
            if (previews := self.stage.dataset.preview_images()) is not None:
                with torch.no_grad():
                    rows = self.stage.samples(net, previews)
                self._write_grid("sheet", done, sample_grid(rows))
                self._write_preview(to_pictures(rows[-1][:1])[0])
        is_base = bool(self.base) and not done and not self.stage.changes_sampling
        if self._samples_due(done) and (images := self.base if is_base else self.generate(net)):
            groups = {f"step {done}": images, **({self.stage.start_title: self.base} if self.base else {})}
            prompts, seeds = self.stage.sample.prompts, self.stage.sample.seeds
            self._write_grid("samples", done, prompt_grid(prompts, seeds, groups), prompts)
            self._write_preview(images[0])
        write_page(self.folder, self.stage.name, done, self.config.steps)

    def generate(self, net: nn.Module, start: bool = False) -> Sequence[Image.Image]:
        """Returns images of the prompts in [sample], none if networks are missing; by the model at the start or now."""
        if self.missing():
            return ()
        pipeline = self.stage.start_pipeline(net) if start else self.stage.pipeline(net)
        return stage_samples(self.stage, pipeline, start)

    def missing(self, images: str = "") -> bool:
        """True if networks for sample grids are missing, or `images`; warns of each once in a run."""
        needs = [need for need in (self.stage.missing_for_samples(), images) if need]
        for need in needs:
            if need not in self._warned:
                self._warned.add(need)
                log.warning("%s: there are no sample grids, which need %s", self.stage.name, need)
        return bool(needs)

    def _sheet_due(self, done: int) -> bool:
        return done > 0 and self._due(done, self.config.sheet_every)

    def _samples_due(self, done: int) -> bool:
        return bool(self.stage.sample.prompts) and self._due(done, self.stage.sample.every or self.config.sheet_every)

    def _validation_due(self, done: int) -> bool:
        dataset = self.stage.dataset
        return dataset.held_out > 0 and self._due(done, dataset.validation.every)

    def _validate(self, done: int, net: nn.Module) -> None:
        """Logs the validation loss, and a warning if it rises."""
        loss = validation_loss(self.stage, net, self.accelerator.autocast)
        append_row(self.folder, {"step": done, "validation": loss})
        self.accelerator.log({"validation": loss}, step=done)
        if warning := rise([(row["step"], row["validation"]) for row in read_log(self.folder) if "validation" in row]):
            log.warning("%s: %s", self.stage.name, warning)

    def _due(self, done: int, every: int) -> bool:
        return done == self.config.steps or done % every == 0

    def _write_grid(self, kind: str, done: int, grid: Image.Image, prompts: Sequence[str] = ()) -> None:
        write_grid(self.folder / f"{kind}-{done:06d}.png", grid, prompts)
        for tracker in self.accelerator.trackers:
            if hasattr(tracker, "log_images"):
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({kind: np.asarray(grid)[None]}, step=done, **layout)

    def _write_preview(self, image: Image.Image) -> None:
        if self.stage.has_preview:
            replace_file(self.folder / f"{self.stage.stem}.png", partial(image.save, format="PNG"))


def stage_samples(stage: Stage[Any], pipeline: WuerstchenPipeline, base: bool = False) -> list[Image.Image]:
    """Returns images of the prompts in [sample], with the settings of the model that a stage trains, or of its base."""
    width, height = map(nearest_legal, stage.dataset.size)
    metadata = base_metadata(stage.bases, "prior", {} if base else stage.sampling())
    return generate_samples(pipeline, stage.sample, metadata, (width, height))
