"""Start a trainer from a configuration file."""

from __future__ import annotations

import importlib
from pathlib import Path

from .config import LoopConfig, from_table, read_config
from .loop import train

STAGES = {
    "vqgan": "VQGANStage",
    "encoder": "EncoderStage",
    "text": "TextStage",
    "decoder": "DecoderStage",
    "prior": "PriorStage",
}


def run(stage: str, config_path: Path, overrides: list[str]) -> Path:
    """Train one stage as the file says, going on where an earlier run stopped; returns the file of its weights.

    `run` in the file is the folder that all stages of a model share; each works in a folder of its own name there.
    """
    config = read_config(config_path, overrides)
    if "run" not in config:
        raise ValueError(f'{config_path} names no run folder: add run = "runs/mine" at its top')
    folder = Path(config["run"])
    loop = from_table(LoopConfig, config.get("train", {}), "train")
    module = importlib.import_module(f".{stage}", __package__)
    return train(getattr(module, STAGES[stage])(config), loop, folder / stage)
