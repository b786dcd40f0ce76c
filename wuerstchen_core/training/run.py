"""Runs the training that a configuration file describes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..checkpoints.modelspec import Statement
from ..common.dataclass_config import from_table
from .config import LoopConfig, check_tables, read_config
from .loop import train
from .samples import SampleConfig
from .stage import Stage
from .stages.decoder import DecoderStage
from .stages.image_encoder import EncoderStage
from .stages.lora import LoraStage
from .stages.prior import PriorStage
from .stages.text_encoder import TextStage
from .stages.token_decoder import TokenDecoderStage
from .stages.vqgan import VQGANStage

STAGES: dict[str, Any] = {  # classes by name; each is constructed with a configuration
    kind.name: kind
    for kind in (VQGANStage, EncoderStage, TextStage, DecoderStage, TokenDecoderStage, PriorStage, LoraStage)
}


def run(stage: str, config_path: Path, overrides: list[str]) -> Path:
    """Trains a stage, or resumes its training, and returns the file of its weights.

    The stages of a model share the folder `run` of the configuration; each has a subfolder of its name there.
    """
    config = read_config(config_path, overrides)
    check_tables(config, STAGES[stage].tables)
    loop_config = from_table(LoopConfig, config.get("train", {}), "train")
    torch.manual_seed(loop_config.seed)  # for the initial weights
    trainer: Stage[Any] = STAGES[stage](config)
    size = config.get("data", {}).get("size")
    resolution = {"resolution": f"{size}x{size}"} if isinstance(size, int) else {}
    trainer.stated = resolution | from_table(Statement, config.get("modelspec", {}), "modelspec").fields()
    trainer.sample = from_table(SampleConfig, config.get("sample", {}), "sample")
    if "start" in config:
        trainer.bases = [config["start"]]
    return train(trainer, loop_config, Path(config["run"]) / stage)
