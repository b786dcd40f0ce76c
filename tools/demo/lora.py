"""Trains the LoRA of the LoRA workflow: `python -m tools.demo.lora`.

With it the shipped model generates everything on a pink background, whatever the prompt says. Takes minutes on a CPU;
train it again whenever the shipped prior changes. Pairs held out of the model's training are held out of this one too.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from wuerstchen_core.checkpoints.shipped import shipped_path
from wuerstchen_core.training.run import run

from .build import RECIPE

CONFIG = RECIPE / "lora.toml"
LORA = shipped_path("demo-pink")


def remake(target: Path = LORA) -> None:
    """Trains the LoRA from scratch and copies it to `target`."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copyfile(run("lora", CONFIG, [f"run='{folder}'"]), target)


if __name__ == "__main__":
    remake()
