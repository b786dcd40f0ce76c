"""Runs the training that a configuration file describes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from ..checkpoints.modelspec import Statement
from ..common.atomic import check_room
from ..common.dataclass_config import from_table
from ..common.lock import folder_lock
from .config import LoopConfig, check_tables, read_config
from .data.sources import has_pictures
from .loop import train
from .processes import choose_precision, is_main_process
from .report import report_end
from .run_folder import CONFIG, record_start
from .samples import SampleConfig
from .stage import Stage
from .tables import STAGES, resolve


def run(
    stage: str, config_path: Path, overrides: list[str], create: Callable[[Mapping[str, Any]], Stage[Any]] | None = None
) -> Path:
    """Trains a stage, or resumes its training, and returns the file of its weights.

    `create` returns the stage of a configuration, by default that of this name. The stages of a model share the folder
    `run` of the configuration; each has a subfolder of its name there, which this process locks. ValueError if another
    process trains there.
    """
    config = read_config(config_path, overrides)
    check_tables(config, STAGES[stage].tables)
    loop_config = from_table(LoopConfig, config.get("train", {}), "train")
    loop_config = replace(loop_config, precision=choose_precision(loop_config.precision))
    folder, main = Path(config["run"]) / stage, is_main_process()
    with ExitStack() as locks:
        is_new = not folder.is_dir()
        if main:  # before networks are loaded
            check_room(folder)
        if main and not is_new:
            locks.enter_context(folder_lock(folder))
        trainer = build_stage(stage, config, create)
        if main and is_new:  # a mistake leaves no folder
            locks.enter_context(folder_lock(folder))
        if main:
            resolved = resolve(stage, {**config, "train": asdict(loop_config)})
            if "model" in trainer.tables:
                resolved["model"] = asdict(getattr(trainer.net, trainer.part, trainer.net).params)
            record_start(folder, resolved, trainer)
        file = train(trainer, loop_config, folder)
        if main:
            report_end(trainer, config, file)
        return file


def open_run(folder: Path, overrides: list[str]) -> tuple[Stage[Any], dict[str, Any]]:
    """Returns the stage of a run and its configuration from its folder, such as runs/mine/lora.

    ValueError if it is no such folder.
    """
    name = folder.resolve().name
    if name not in STAGES or not (folder / CONFIG).is_file():
        raise ValueError(
            f"{folder} is not the folder of a run, such as runs/mine/lora, which has a {CONFIG}: give that"
        )
    config = read_config(folder / CONFIG, overrides)
    check_tables(config, STAGES[name].tables)
    return build_stage(name, config), config


def build_stage(
    stage: str, config: Mapping[str, Any], create: Callable[[Mapping[str, Any]], Stage[Any]] | None = None
) -> Stage[Any]:
    """Returns the stage of a configuration, with a network that is loaded or randomly initialised."""
    torch.manual_seed(config.get("train", {}).get("seed", 0))  # for the initial weights
    trainer: Stage[Any] = (create or STAGES[stage])(config)
    size = "x".join(map(str, trainer.dataset.size))
    resolution = {"resolution": size} if has_pictures(config.get("data", {})) else {}
    stated = resolution | from_table(Statement, config.get("modelspec", {}), "modelspec").fields()
    if words := dict.fromkeys([*trainer.dataset.trigger_words, *stated.get("trigger_words", ())]):
        stated["trigger_words"] = list(words)
    trainer.stated = stated
    trainer.sample = from_table(SampleConfig, config.get("sample", {}), "sample")
    if config.get("start") and config["start"] not in trainer.bases:
        trainer.bases = [config["start"], *trainer.bases]
    return trainer
