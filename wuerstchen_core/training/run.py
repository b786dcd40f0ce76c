"""Start a trainer from a configuration file."""

from __future__ import annotations

import importlib
from pathlib import Path

import torch

from ..tables import from_table
from .config import LoopConfig, check_tables, read_config
from .inputs import source_of, told_of
from .loop import train

STAGES = {
    "vqgan": "VQGANStage",
    "encoder": "EncoderStage",
    "text": "TextStage",
    "decoder": "DecoderStage",
    "token-decoder": "TokenDecoderStage",
    "prior": "PriorStage",
    "lora": "LoraStage",
}
INPUTS = tuple(stage for stage in STAGES if stage != "lora")  # whose networks other stages ask


def run(stage: str, config_path: Path, overrides: list[str]) -> Path:
    """Train one stage as the file says, going on where an earlier run stopped; returns the file of its weights.

    `run` in the file is the folder that all stages of a model share; each works in a folder of its own name there.
    """
    config = read_config(config_path, overrides)
    kind = getattr(importlib.import_module(f".{stage.replace('-', '_')}", __package__), STAGES[stage])
    check_tables(config, kind.tables, kind.sized)
    unknown = sorted(set(config.get("inputs", {})) - set(INPUTS))
    if unknown:
        raise ValueError(f"[inputs] has no key {', '.join(unknown)}: it takes {', '.join(INPUTS)}")
    loop = from_table(LoopConfig, config.get("train", {}), "train")
    torch.manual_seed(loop.seed)  # of the first weights
    trained = kind(config)
    trained.told = told_of(config.get("start") if kind.sized else source_of(config, "prior"))
    return train(trained, loop, Path(config["run"]) / stage)
