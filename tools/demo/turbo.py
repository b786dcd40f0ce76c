"""Trains and measures a LoRA with which the shipped model needs few steps: `python -m tools.demo.turbo`.

They are two of Stage C without guidance, by the LoRA, and one of Stage B, which needs no training. Train it again
whenever the shipped prior changes; an interrupted training resumes. Prints the numbers of the model with it, those of
its own schedule, and the seconds of an image, also with `fast`, all measured in one run, as JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from wuerstchen_core.checkpoints.weight_files import read_file_metadata
from wuerstchen_core.checkpoints.writer import write_tensors
from wuerstchen_core.demo.vocabulary import Scene, caption
from wuerstchen_core.inference.pipeline import WuerstchenPipeline
from wuerstchen_core.models.image_encoder import semantic_view
from wuerstchen_core.training.run import run

from .build import RECIPE
from .evaluate import evaluate, generate, held_out_scenes, subset
from .steps_trials import FAST, detail

LORA = RECIPE.parent / "wuerstchen-demo-turbo.safetensors"
CONFIG = RECIPE / "turbo.toml"
DECODER_STEPS = 1
SEEDS, PROMPTS = 20, 8  # images for the spread, of each prompt
SEED = 20_000
TIMED = 16  # images, of each way in turn


def remake(folder: Path, target: Path = LORA) -> None:
    """Trains the LoRA in a run folder, and writes it in fp16, with the steps of Stage B too."""
    file = run("distill-lora", CONFIG, [f"run='{folder}'"])
    halves = {key: x.half() for key, x in load_file(file).items()}
    header = read_file_metadata(file)
    sampling = json.loads(header["sampling"]) | {"decoder_steps": DECODER_STEPS}
    write_tensors(target, halves, header | {"sampling": json.dumps(sampling)})


def spread(features: Tensor) -> float:
    """Returns the mean squared distance of features [N, ...] from their mean."""
    return float((features - features.mean(0)).square().sum() / len(features))


@torch.inference_mode()
def spread_of_images(pipe: WuerstchenPipeline, scenes: Sequence[Scene]) -> float:
    """Returns the spread of the image encoder's features over the seeds of a prompt, averaged over prompts."""
    assert pipe.image_encoder is not None
    found = []
    for scene in scenes:
        images = pipe.generate(caption(scene), seed=SEED, count=SEEDS)
        pixels = torch.from_numpy(np.stack([np.asarray(x) for x in images])).permute(0, 3, 1, 2).float() / 255
        found.append(spread(pipe.image_encoder(semantic_view(pixels)).float()))
    return sum(found) / len(found)


def measure(pipe: WuerstchenPipeline, seeds: int, every: int) -> dict[str, Any]:
    """Returns the numbers of a model: those of `evaluate`, detail, and spread."""
    scenes = subset(held_out_scenes(pipe.metadata), PROMPTS)
    images = [image for number, scene in enumerate(scenes) for image in generate(pipe, [scene], SEED + number)]
    return {
        "detail": sum(detail(np.asarray(image)) for image in images) / len(images),
        "spread": spread_of_images(pipe, scenes),
        **evaluate(pipe, seeds, every),
    }


def timed(own: WuerstchenPipeline, turbo: WuerstchenPipeline) -> dict[str, float]:
    """Returns the median seconds of an image, of a model with its own settings, with `fast`, and with the LoRA."""
    ways = {
        "own": own.generate,
        "fast": partial(own.generate, schedule="fast", decoder_steps=FAST.decoder_steps),
        "turbo": turbo.generate,
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    scenes = subset(held_out_scenes(own.metadata), TIMED + 1)
    for scene in scenes:
        for name, make in ways.items():
            began = time.process_time()
            make(caption(scene), seed=SEED)
            found[name].append(time.process_time() - began)
    return {name: float(np.median(seconds[1:])) for name, seconds in found.items()}  # the first one warms up


def compare(model: str, lora: Path, seeds: int, every: int) -> dict[str, Any]:
    """Returns the numbers of a model without and with a LoRA, and of the latter as fractions of the former."""
    pipes = [
        WuerstchenPipeline.load(model, device="cpu", dtype="fp32", lora=files, progress=False) for files in ([], [lora])
    ]
    seconds = timed(*pipes)
    own, turbo = (measure(pipe, seeds, every) for pipe in pipes)
    ratios = {name: round(turbo[name] / own[name], 3) for name in ("detail", "spread")}
    ratios |= {f"seconds of {name}": round(seconds["turbo"] / seconds[name], 3) for name in ("own", "fast")}
    return {"own": own, "turbo": turbo, "seconds": seconds, "ratios": ratios}


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains the LoRA, or only measures one, and prints the numbers."""
    parser = argparse.ArgumentParser(prog="python -m tools.demo.turbo", description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("runs/demo-turbo"), help="folder of the runs")
    parser.add_argument("--model", default="demo", help="bundle to measure (default: demo)")
    parser.add_argument("--lora", type=Path, help="measure this LoRA, without training")
    parser.add_argument("--seeds", type=int, default=3, help="images per scene (default: 3)")
    parser.add_argument("--every", type=int, default=1, help="use only every N-th held-out (thing, background) pair")
    options = parser.parse_args(arguments)
    if options.lora is None:
        remake(options.run)
    numbers = compare(options.model, options.lora or LORA, options.seeds, options.every)
    sys.stdout.write(json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    main()
