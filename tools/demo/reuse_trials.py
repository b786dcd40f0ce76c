"""The trials of reuse in Stage B, measured on the shipped model for docs/steps.md."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
import torch
from PIL import Image

from wuerstchen_core.demo.vocabulary import Scene, caption
from wuerstchen_core.inference.pipeline import WuerstchenPipeline
from wuerstchen_core.models.feature_reuse import full_steps

from .. import markdown_table
from .evaluate import BATCH, judge_images
from .judge import Judge, psnr

# Steps and reuse; the first is the reference. Larger values of reuse leave three full steps too.
TRIALS = [*product([12], (1, 2, 3, 4)), *product([8], (1, 2, 3)), *product((6, 4), (1, 2))]
SEED = 1  # of the first picture


@torch.inference_mode()
def measure(scenes: Sequence[Scene]) -> dict[str, Any]:
    """Returns the results of all trials, which take turns so that they are timed alike."""
    pipe, judge = WuerstchenPipeline.load("demo", device="cpu", dtype="fp32"), Judge()
    images: dict[tuple[int, int], list[Image.Image]] = {trial: [] for trial in TRIALS}
    seconds = dict.fromkeys(TRIALS, 0.0)
    for start in range(0, len(scenes), BATCH):
        texts = pipe.encode_text([caption(scene) for scene in scenes[start : start + BATCH]])
        features = pipe.sample_prior(texts[0], pipe.sampling, seed=SEED + start)
        for steps, interval in TRIALS:
            settings = pipe.sampling.updated(decoder_steps=steps, decoder_reuse=interval)
            began = time.process_time()
            latents = pipe.sample_decoder(features, texts[1], settings, seed=SEED + start)
            seconds[steps, interval] += time.process_time() - began
            images[steps, interval] += pipe.decode(latents)
    rows = []
    for trial in TRIALS:
        near = [psnr(np.asarray(a), np.asarray(b)) for a, b in zip(images[trial], images[TRIALS[0]], strict=True)]
        right = sum(scene.thing == seen.thing for scene, seen in judge_images(judge, scenes, images[trial]))
        rows.append({
            "steps": trial[0],
            "reuse": trial[1],
            "thing": right,
            "psnr": None if trial == TRIALS[0] else [round(float(x), 1) for x in (np.mean(near), min(near))],
            "time": round(seconds[trial] / seconds[TRIALS[0]], 2),
        })  # fmt: skip
    return {"count": len(scenes), "rows": rows}


def table(results: Mapping[str, Any]) -> str:
    """Returns the results as a Markdown table."""
    head = ("steps", "reuse", "full steps", "right things", "PSNR", "lowest", "time")
    rows = []
    for row in results["rows"]:
        distance = ["same", ""] if row["psnr"] is None else [f"{x:.1f}" for x in row["psnr"]]
        right = f"{100 * row['thing'] / results['count']:.1f} %"
        full = len(full_steps(row["steps"], row["reuse"]))
        rows.append([row["steps"], row["reuse"], full, right, *distance, f"{row['time']:.2f}"])
    return markdown_table(head, rows, len(head))
