"""Measure a model on the held-out pictures: `python -m wuerstchen_core.demo.recipe.evaluate [--json FILE]`.

Every held-out scene is painted with each of three seeds and judged by `judge.Judge`, which looks at pixels and is no
trained network; every held-out picture is sent through the 42.67x bottleneck, judged and compared.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from ...models.image_encoder import semantic_view
from ...pipeline import WuerstchenPipeline
from ..artwork import CANVAS, draw_all
from ..judge import NOTHING, Judge, psnr, wilson_interval
from ..vocabulary import SIZES, THINGS, Scene, caption, held_out, scenes

BATCH = 16


def held_out_scenes(metadata: Mapping[str, Any] | None = None) -> list[Scene]:
    """All scenes whose (thing, background) pair training never saw; of the things that a bundle's `metadata` names."""
    known = (metadata or {}).get("vocabulary", {}).get("things", [thing.name for thing in THINGS])
    return [scene for scene in scenes() if held_out(scene) and THINGS[scene.thing].name in known]


@torch.inference_mode()
def paint(pipe: WuerstchenPipeline, wanted: Sequence[Scene], seed: int, **changes: Any) -> list[Image.Image]:
    """One picture of each scene, in batches; picture i has seed `seed` + i."""
    images: list[Image.Image] = []
    for start in range(0, len(wanted), BATCH):
        prompts = [caption(scene) for scene in wanted[start : start + BATCH]]
        images += pipe.generate(prompts, seed=seed + start, **changes)
    return images


def judge_pictures(judge: Judge, wanted: Sequence[Scene], images: Sequence[Image.Image]) -> list[dict[str, Any]]:
    """For each picture: its scene, the thing and the background that the judge sees."""
    rows = []
    for scene, image in zip(wanted, images, strict=True):
        pixels = np.asarray(image)
        seen = judge.identify(pixels, scene.colour, scene.size)
        rows.append({"scene": scene, "thing": seen, "background": judge.background(pixels)})
    return rows


@torch.inference_mode()
def reconstruct(
    pipe: WuerstchenPipeline, wanted: Sequence[Scene], **changes: Any
) -> tuple[list[Image.Image], list[float]]:
    """Each scene's true picture after the 42.67x bottleneck (no text), and the PSNR of it in dB."""
    assert pipe.image_encoder is not None
    sampling = pipe.sampling.changed(width=CANVAS, height=CANVAS, **changes)
    images: list[Image.Image] = []
    values: list[float] = []
    for start in range(0, len(wanted), BATCH):
        truth = draw_all(wanted[start : start + BATCH])
        pixels = torch.from_numpy(truth).permute(0, 3, 1, 2).float() / 255
        features = pipe.image_encoder(semantic_view(pixels)).float()
        _, text = pipe.encode_text([""])
        painted = pipe.paint(features, text.expand(len(truth), -1, -1), sampling, seed=0)
        values += [psnr(a, np.asarray(b)) for a, b in zip(truth, painted, strict=True)]
        images += painted
    return images, values


def share(hits: Sequence[bool]) -> dict[str, Any]:
    """A share in percent with its 95 % confidence interval."""
    low, high = wilson_interval(sum(hits), len(hits))
    percent = [round(100 * value, 1) for value in (sum(hits) / len(hits), low, high)]
    return {"percent": percent[0], "interval": percent[1:], "count": len(hits)}


def summary(
    rows: Sequence[dict[str, Any]], compressed: Sequence[dict[str, Any]], values: Sequence[float]
) -> dict[str, Any]:
    """The numbers that the README quotes of what was painted and what was compressed; what was mistaken for what."""
    wrong = [row for row in rows if row["thing"] != row["scene"].thing]
    names = [thing.name for thing in THINGS]
    return {
        "thing": share([row["thing"] == row["scene"].thing for row in rows]),
        "another_thing": share([row["thing"] not in (row["scene"].thing, NOTHING) for row in rows]),
        "background": share([row["background"] == row["scene"].colour for row in rows]),
        "by_size": {
            size: share([row["thing"] == row["scene"].thing for row in rows if row["scene"].size == index])
            for index, size in enumerate(SIZES)
            if any(row["scene"].size == index for row in rows)
        },
        "compressed": share([row["thing"] == row["scene"].thing for row in compressed]),
        "psnr": {"mean": round(statistics.mean(values), 2), "min": round(min(values), 2), "count": len(values)},
        "mistakes": [
            f"{caption(row['scene'])}: {names[row['thing']] if row['thing'] >= 0 else 'nothing'}" for row in wrong
        ],
        "backgrounds_missed": [caption(r["scene"]) for r in rows if r["background"] != r["scene"].colour],
    }


def evaluate(pipe: WuerstchenPipeline, seeds: int = 3, every: int = 1, **changes: Any) -> dict[str, Any]:
    """All numbers of a model, over every `every`-th held-out (thing, background) pair; `changes` go to `generate`."""
    held = held_out_scenes(pipe.metadata)
    wanted = [scene for index, scene in enumerate(held) if index // len(SIZES) % every == 0]
    judge, rows = Judge(), []
    for seed in tqdm(range(seeds), desc="seeds"):
        rows += judge_pictures(judge, wanted, paint(pipe, wanted, 1000 * (seed + 1), **changes))
    images, values = reconstruct(pipe, wanted, **changes)
    return summary(rows, judge_pictures(judge, wanted, images), values)


def main(arguments: Sequence[str] | None = None) -> None:
    """Evaluate, and write the numbers as JSON."""
    parser = argparse.ArgumentParser(prog="python -m wuerstchen_core.demo.recipe.evaluate", description=__doc__)
    parser.add_argument("--model", default="demo", help="bundle to measure")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--every", type=int, default=1, help="take only every N-th held-out (thing, background) pair")
    parser.add_argument("--schedule", help="of Stage C: original, diffusers, fast or linear")
    parser.add_argument("--prior-steps", type=int)
    parser.add_argument("--prior-guidance", type=float)
    parser.add_argument("--decoder-steps", type=int)
    parser.add_argument("--json", type=Path, help="write the numbers here too")
    options = vars(parser.parse_args(arguments))
    target, pipe = options.pop("json"), WuerstchenPipeline.load(options.pop("model"))
    text = json.dumps(evaluate(pipe, **options), indent=1)
    sys.stdout.write(text + "\n")
    if target:
        target.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
