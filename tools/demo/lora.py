"""Train the LoRA that the LoRA workflow shows: `python -m tools.demo.lora`.

With it the shipped model paints everything on a pink background, whatever background is asked for. Minutes on a
processor; to be trained again whenever the shipped prior is. The pairs held out of the model's training stay held out.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from wuerstchen_core.training.run import run

CONFIG = Path(__file__).with_name("lora.toml")
LORA = Path("workflows") / "wuerstchen_demo_pink.safetensors"  # from the root of the repository


def remake(root: Path) -> None:
    """Train the shipped model's LoRA, from nothing, and put it beside the workflows under `root`."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copyfile(run("lora", CONFIG, [f"run='{folder}'"]), root / LORA)


if __name__ == "__main__":
    remake(Path(__file__).parents[2])
