"""Start a trainer from a configuration file."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch

from ..common.dataclass_config import from_table
from .config import LoopConfig, check_tables, read_config
from .loop import train
from .stage import Stage
from .stages.networks import base_metadata

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
    """A stage's class."""
    module, name = STAGES[stage].split(".")
    kind: type[Stage[Any]] = getattr(importlib.import_module(f".stages.{module}", __package__), name)
    return kind


def run(stage: str, config_path: Path, overrides: list[str]) -> Path:
    """Train one stage as the file says, going on where an earlier run stopped; returns the file of its weights.

    `run` in the file is the folder that all stages of a model share; each works in a folder of its own name there.
    """
    config = read_config(config_path, overrides)
    kind: Any = stage_class(stage)  # a subclass, which takes a configuration
    check_tables(config, kind.tables)
    loop = from_table(LoopConfig, config.get("train", {}), "train")
    torch.manual_seed(loop.seed)  # of the first weights
    trained = kind(config)
    trained.told = base_metadata(trained.bases(config))
    return train(trained, loop, Path(config["run"]) / stage)
