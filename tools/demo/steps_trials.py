"""The trials of steps.py: samplers, schedules and numbers of steps, and what the shipped model makes of them."""

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
    linear_times,
    squared_times,
    two_part_times,
)
from wuerstchen_core.inference.pipeline import WuerstchenPipeline
from wuerstchen_core.inference.stages import in_fp32
from wuerstchen_core.models.image_encoder import semantic_view
from wuerstchen_core.models.prior import KVCache, features_from_latents

from .evaluate import held_out_scenes, judge_pictures
from .judge import Judge, psnr

FAST = SCHEDULES["fast"]
Trial = tuple[str, str, str, int]  # stage, sampler, schedule, steps

RESULTS = Path(__file__).with_name("steps.json")
SEED, EVERY = 1, 18  # of the noise; of the held-out pairs only every so many
COUNTS = {"prior": (2, 4, 6, 8, 12, 30), "decoder": (1, 2, 4, 8, 12)}
REFERENCE: dict[str, Trial] = {
    "prior": ("prior", "ddpm", "original", 30),
    "decoder": ("decoder", "ddpm", "linear", 12),
}
HARD = "a small umbrella on a red background", "a small teddy bear on a red background"  # few steps get them wrong
HARD_SEEDS = 20  # of each
HARD_TRIALS: list[Trial] = [
    REFERENCE["prior"],
    *(("prior", "ddpm", "squared", steps) for steps in (6, 8, 12)),
    *(("prior", "ddim", "squared", steps) for steps in (5, FAST.steps)),
]
PREVIEW = 2  # steps of Stage B under a Stage C that is measured
WHOLE_EVERY = 3  # of the held-out pairs, for what is painted from beginning to end
WHOLE: dict[str, dict[str, Any]] = {
    "original, 30 + 12": {"schedule": "original", "decoder_steps": 12},
    f"fast, {FAST.steps} + {FAST.decoder_steps}": {"schedule": "fast"},
}


def log_snr_times(steps: int) -> Tensor:
    """Equal steps of the logarithm of signal to noise, from end to end of the clamped schedule."""
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
    """The shipped model, prompts, and what does not change from one trial to the next; picture i has seed SEED + i."""

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
        """Features [B, 16, 6, 6] that Stage C paints."""
        assert self.pipe.prior is not None
        draw, scale = seeded_noise(SEED, len(self.scenes)), self.pipe.sampling.prior_guidance
        predict = guided(in_fp32(self.pipe.prior, KVCache(self.pipe.prior)), self.text[:1], (self.nothing,), scale)
        x = sample(predict, draw(self.true_features), times, draw=draw, sampler=sampler)
        return features_from_latents(x, self.pipe.prior.params)

    def decoder(self, sampler: str, times: Tensor, features: Tensor) -> list[Image.Image]:
        """Pictures of features."""
        assert self.pipe.decoder is not None and self.pipe.vqgan is not None
        draw, cond = seeded_noise(SEED, len(self.scenes)), (features, self.text[1])
        noise = draw(torch.empty(len(features), 4, 64, 64))
        predict = guided(in_fp32(self.pipe.decoder), cond, cond, 1.0)
        x = sample(predict, noise, times, draw=draw, sampler=sampler)
        return self.pipe.decode(x * self.pipe.vqgan.params.scale_factor)

    def measure(self, stage: str, sampler: str, schedule: str, steps: int) -> dict[str, Any]:
        """One trial."""
        row: dict[str, Any] = {"stage": stage, "sampler": sampler, "schedule": schedule, "steps": steps}
        times = SHAPES[schedule](steps)
        if stage == "prior":
            features = self.prior(sampler, times)
            error = (features - self.true_features).square().mean() / self.true_features.var()
            row["error"] = round(float(error), 4)
            pictures = self.decoder("ddpm", linear_times(PREVIEW), features)
        else:
            pictures = self.decoder(sampler, times, self.features)
        judged = judge_pictures(self.judge, self.scenes, pictures)
        pairs = list(zip(map(np.asarray, pictures), self.truth, strict=True))
        return row | {
            "thing": sum(asked.thing == seen.thing for asked, seen in judged),
            "background": sum(asked.colour == seen.colour for asked, seen in judged),
            "psnr": round(float(np.mean([psnr(*pair) for pair in pairs])), 2),
            "detail": round(float(np.mean([edges(a) / edges(b) for a, b in pairs])), 3),
        }


def edges(picture: np.ndarray) -> float:
    """How much neighbouring pixels [H, W, 3] differ: the mean size of the Laplacian of their mean colour."""
    grey = picture.mean(axis=-1, dtype=np.float64)
    around = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:]
    return float(np.abs(4 * grey[1:-1, 1:-1] - around).mean())


def some_scenes() -> list[Scene]:
    """What the trials paint."""
    held = held_out_scenes(read_metadata("demo"))
    return [scene for index, scene in enumerate(held) if index // len(SIZES) % EVERY == 0]


def trials() -> Iterator[Trial]:
    """All that are compared."""
    for stage, counts in COUNTS.items():
        yield from product([stage], SAMPLERS, SHAPES, counts)


def read_results(path: Path = RESULTS) -> dict[str, Any]:
    """What was measured of the shipped model so far."""
    model = hashlib.sha256(demo_path().read_bytes()).hexdigest()[:12]
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found if found.get("model") == model else {"model": model, "rows": [], "whole": {}}


def write_results(results: dict[str, Any], path: Path = RESULTS) -> None:
    """One line a trial."""
    rows = ",\n".join(map(json.dumps, results["rows"]))
    rest = json.dumps({**results, "rows": []}, indent=1)
    path.write_text(rest.replace('"rows": []', f'"rows": [\n{rows}\n]') + "\n", encoding="utf-8")
