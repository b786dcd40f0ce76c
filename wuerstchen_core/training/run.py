"""Trains a stage as a configuration file says."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch

from ..common.dataclass_config import from_table
from .config import LoopConfig, check_tables, read_config
from .loop import train
from .stage import Stage

STAGES = {
    "vqgan": "vqgan.VQGANStage",
    "encoder": "image_encoder.EncoderStage",
    "text": "text_encoder.TextStage",
    "decoder": "decoder.DecoderStage",
    "token-decoder": "token_decoder.TokenDecoderStage",
    "prior": "prior.PriorStage",
    "lora": "lora.LoraStage",
}


def stage_class(stage: str) -> type[Stage[Any]]:
    """Returns the class of a stage, and imports only its module."""
    module, name = STAGES[stage].split(".")
    kind: type[Stage[Any]] = getattr(importlib.import_module(f".stages.{module}", __package__), name)
    return kind


def run(stage: str, config_path: Path, overrides: list[str]) -> Path:
    """Trains a stage, or resumes its training, and returns the file of its weights.

    The stages of a model share the folder `run` of the configuration; each has a subfolder of its name there.
    """
    config = read_config(config_path, overrides)
    kind: Any = stage_class(stage)  # a concrete class, which takes the configuration
    check_tables(config, kind.tables)
    loop_config = from_table(LoopConfig, config.get("train", {}), "train")
    torch.manual_seed(loop_config.seed)  # of the initial weights
    trainer = kind(config)
    if "start" in config:
        trainer.bases = [config["start"]]
    return train(trainer, loop_config, Path(config["run"]) / stage)
