"""Writes the weights of a checkpoint."""

from __future__ import annotations

from pathlib import Path

from .checkpoint import load_checkpoint, record_weights, weights_name
from .config import read_config
from .ema import meta_copy
from .run import build_stage
from .run_folder import CONFIG
from .stages.networks import weights_metadata
from .tables import STAGES


def export(checkpoint: Path, output: Path | None = None) -> Path:
    """Writes the averaged weights of a checkpoint as training does, and returns their file.

    It is by default beside the checkpoint, such as lora-000500.safetensors. ValueError if it is in no run's folder.
    """
    if not checkpoint.is_file():
        raise ValueError(f"{checkpoint} is not a file: name a checkpoint, such as run/lora/checkpoint-00000500.pt")
    folder = checkpoint.resolve().parent
    if folder.name not in STAGES or not (folder / CONFIG).is_file():
        raise ValueError(f"{checkpoint} is not in the folder of a run, which has a {CONFIG}: leave it there")
    stage = build_stage(folder.name, read_config(folder / CONFIG, []))
    contents, net = load_checkpoint(checkpoint), meta_copy(stage.net)
    net.load_state_dict(contents["average"], assign=True)
    step = contents["step"]
    file = output or checkpoint.parent / weights_name(stage.stem, step)
    stage.save(file, net, {**weights_metadata(stage), "training": {"step": step}})
    if output is None:
        record_weights(file, step)
    return file
