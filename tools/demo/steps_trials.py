"""The trials of the step study: samplers, schedules and numbers of steps, measured on the shipped model."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from wuerstchen_core.checkpoints import demo_path, read_metadata
from wuerstchen_core.demo.artwork import draw_all
from wuerstchen_core.demo.vocabulary import SIZES, Scene, caption
from wuerstchen_core.diffusion.samplers import guided, sample, seeded_noise
from wuerstchen_core.diffusion.schedule import (
    ALPHA_BAR_MAX,
    ALPHA_BAR_MIN,
    SCHEDULES,
    S,
    decoder_times,
    linear_times,
    squared_times,
    two_part_times,
)
from wuerstchen_core.inference.pipeline import WuerstchenPipeline
from wuerstchen_core.inference.stages import in_fp32
from wuerstchen_core.models.image_encoder import semantic_view
from wuerstchen_core.models.prior import KVCache, features_from_latents

from .evaluate import held_out_scenes, judge_images
from .judge import Judge, psnr

FAST = SCHEDULES["fast"]
Trial = tuple[str, str, str, int]  # stage, sampler, schedule, steps

RESULTS = Path(__file__).with_name("steps.json")
SEED, EVERY = 1, 18  # of the noise; every 18th held-out pair
COUNTS = {"prior": (2, 4, 6, 8, 12, 30), "decoder": (1, 2, 4, 8, 12)}
REFERENCE: dict[str, Trial] = {
    "prior": ("prior", "ddpm", "original", 30),
    "decoder": ("decoder", "ddpm", "linear", 12),
}
HARD = "a small umbrella on a red background", "a small teddy bear on a red background"  # often wrong with few steps
HARD_SEEDS = 20  # images of each
HARD_TRIALS: list[Trial] = [
    REFERENCE["prior"],
    *(("prior", "ddpm", "squared", steps) for steps in (6, 8, 12)),
    *(("prior", "ddim", "squared", steps) for steps in (5, FAST.steps)),
]
PREVIEW = 2  # steps of Stage B when Stage C is measured
WHOLE_EVERY = 3  # every third held-out pair, for whole images
WHOLE: dict[str, dict[str, Any]] = {
    "original, 30 + 12": {"schedule": "original", "decoder_steps": 12},
    f"fast, {FAST.steps} + {FAST.decoder_steps}": {"schedule": "fast", "decoder_steps": FAST.decoder_steps},
}


def log_snr_times(steps: int) -> Tensor:
    """Returns equal steps of the log signal-to-noise ratio, over the whole clamped schedule."""
    first, last = torch.tensor([ALPHA_BAR_MIN, ALPHA_BAR_MAX], dtype=torch.float64).logit()
    signal = torch.linspace(float(first), float(last), steps + 1, dtype=torch.float64).sigmoid()
    start = math.cos(S / (1 + S) * math.pi / 2)
    times = torch.acos(signal.sqrt() * start) * 2 / math.pi * (1 + S) - S
    times[0], times[-1] = 1, 0
    return times.float()


SAMPLERS = {"ddpm": "DDPM", "ddim": "DDIM", "dpmpp_2m": "DPM-Solver++(2M)"}
SHAPES: dict[str, Callable[[int], Tensor]] = {
    "linear": linear_times,
    "original": two_part_times,
    "log-SNR": log_snr_times,
    "squared": squared_times,
}


class Study:
    """The model, the prompts, and everything else that all trials use; image i has seed SEED + i."""

    def __init__(self, scenes: Sequence[Scene]) -> None:
        self.pipe = WuerstchenPipeline.load("demo", device="cpu", dtype="fp32")
        self.scenes = scenes
        self.judge, self.truth = Judge(), draw_all(self.scenes)
        pixels = torch.from_numpy(self.truth).permute(0, 3, 1, 2).float() / 255
        assert self.pipe.image_encoder is not None
        self.true_features = self.pipe.image_encoder(semantic_view(pixels)).float()
        self.text = self.pipe.encode_text([caption(scene) for scene in self.scenes])
        self.nothing = self.pipe.encode_text([""])[0].expand_as(self.text[0])
        _, sampler, schedule, steps = REFERENCE["prior"]
        self.features = self.prior(sampler, SHAPES[schedule](steps))

    def prior(self, sampler: str, times: Tensor) -> Tensor:
        """Samples Stage C; returns features [B, 16, 6, 6]."""
        assert self.pipe.prior is not None
        draw, scale = seeded_noise(SEED, len(self.scenes)), self.pipe.sampling.prior_guidance
        predict = guided(in_fp32(self.pipe.prior, KVCache(self.pipe.prior)), self.text[:1], (self.nothing,), scale)
        x = sample(predict, draw(self.true_features), times, draw=draw, sampler=sampler)
        return features_from_latents(x, self.pipe.prior.params)

    def decoder(self, sampler: str, times: Tensor, features: Tensor) -> list[Image.Image]:
        """Samples Stage B from features and decodes."""
        assert self.pipe.decoder is not None and self.pipe.vqgan is not None
        draw, cond = seeded_noise(SEED, len(self.scenes)), (features, self.text[1])
        noise = draw(torch.empty(len(features), 4, 64, 64))
        predict = guided(in_fp32(self.pipe.decoder), cond, cond, 1.0)
        x = sample(predict, noise, times, draw=draw, sampler=sampler)
        return self.pipe.decode(x * self.pipe.vqgan.params.scale_factor)

    def measure(self, stage: str, sampler: str, schedule: str, steps: int) -> dict[str, Any]:
        """Returns the results of one trial."""
        row: dict[str, Any] = {"stage": stage, "sampler": sampler, "schedule": schedule, "steps": steps}
        if stage == "prior":
            features = self.prior(sampler, SHAPES[schedule](steps))
            error = (features - self.true_features).square().mean() / self.true_features.var()
            row["error"] = round(float(error), 4)
            images = self.decoder("ddpm", linear_times(PREVIEW), features)
        else:
            times = SHAPES[schedule](steps) if steps > 1 else decoder_times(steps)
            images = self.decoder(sampler, times, self.features)
        judged = judge_images(self.judge, self.scenes, images)
        pairs = list(zip(map(np.asarray, images), self.truth, strict=True))
        return row | {
            "thing": sum(scene.thing == seen.thing for scene, seen in judged),
            "background": sum(scene.colour == seen.colour for scene, seen in judged),
            "psnr": round(float(np.mean([psnr(*pair) for pair in pairs])), 2),
            "detail": round(float(np.mean([detail(a) / detail(b) for a, b in pairs])), 3),
        }


def detail(image: np.ndarray) -> float:
    """Returns the mean absolute Laplacian of the grey values of pixels [H, W, 3]."""
    grey = image.mean(axis=-1, dtype=np.float64)
    around = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:]
    return float(np.abs(4 * grey[1:-1, 1:-1] - around).mean())


def study_scenes(every: int = EVERY) -> list[Scene]:
    """Returns the held-out scenes of the trials, all sizes of every n-th pair."""
    scenes = held_out_scenes(read_metadata("demo"))
    return [scene for index, scene in enumerate(scenes) if index // len(SIZES) % every == 0]


def trials() -> Iterator[Trial]:
    """Yields every combination that is compared."""
    for stage, counts in COUNTS.items():
        yield from product([stage], SAMPLERS, SHAPES, counts)


def shipped_model() -> str:
    """Returns the name that results give to the shipped weights."""
    return hashlib.sha256(demo_path().read_bytes()).hexdigest()[:12]


def stored_results(path: Path = RESULTS) -> dict[str, Any]:
    """Returns the stored results, of the shipped or of earlier weights; without rows if there are none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else _empty(shipped_model())


def read_results(path: Path = RESULTS) -> dict[str, Any]:
    """Returns the results for the shipped weights; without rows if they are of other weights."""
    results, model = stored_results(path), shipped_model()
    return results if results["model"] == model else _empty(model)


def _empty(model: str) -> dict[str, Any]:
    return {"model": model, "rows": [], "whole": {}}


def write_results(results: dict[str, Any], path: Path = RESULTS) -> None:
    """Writes the results with one line per trial."""
    rows = ",\n".join(map(json.dumps, results["rows"]))
    rest = json.dumps({**results, "rows": []}, indent=1)
    path.write_text(rest.replace('"rows": []', f'"rows": [\n{rows}\n]') + "\n", encoding="utf-8")
