"""The cosine noise schedule in continuous time, and named time schedules.

t = 1 is noise, t = 0 the picture. Source: Nichol & Dhariwal, arXiv 2102.09672, equation 17, as the original uses it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..common.numbers import to_float, to_int
from ..common.text import check_choice

S = 0.008
ALPHA_BAR_MIN, ALPHA_BAR_MAX = 1e-4, 0.9999
SINGLE_STEP_START = 0.95
MAX_STEPS = 10_000  # more is surely a typing error and would fill the memory


def alpha_bar(t: Tensor) -> Tensor:
    """Returns the signal's fraction of the variance at times t (any shape), clamped to [1e-4, 0.9999]."""
    s = torch.tensor(S, dtype=t.dtype, device=t.device)
    start = torch.cos(s / (1 + s) * math.pi * 0.5) ** 2
    return (torch.cos((t + s) / (1 + s) * math.pi * 0.5) ** 2 / start).clamp(ALPHA_BAR_MIN, ALPHA_BAR_MAX)


def expand(per_sample: Tensor, like: Tensor) -> Tensor:
    """Reshapes [B] to [B, 1, 1, ...] with as many dimensions as `like`."""
    return per_sample.view(-1, *[1] * (like.dim() - 1))


def diffuse(x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """Returns x0 [B, ...] noised to times t [B] (arXiv 2006.11239, equation 4)."""
    signal = expand(alpha_bar(t), x0)
    return signal.sqrt() * x0 + (1 - signal).sqrt() * noise


def p2_weight(t: Tensor) -> Tensor:
    """Returns the loss weight at times t (arXiv 2204.00227, equation 8, with k = gamma = 1): 1 - alpha_bar."""
    signal = alpha_bar(t)
    return 1 / (1 + signal / (1 - signal))


def training_times(uniform: Tensor) -> Tensor:
    """Maps uniform numbers in [0, 1) to the original's training times; 7.5 % of them are exactly 1."""
    return (1 - uniform).mul(1.08).add(0.001).clamp(0.001, 1.0)


def linear_times(steps: int, start: float = 1.0, end: float = 0.0) -> Tensor:
    """Returns [steps + 1] equally spaced times. Raises ValueError unless steps is from 1 to MAX_STEPS."""
    steps = to_int("the number of steps", steps)
    if not 1 <= steps <= MAX_STEPS:
        raise ValueError(f"{steps} sampling steps cannot be taken: choose a number from 1 to {MAX_STEPS}")
    return torch.linspace(start, end, steps + 1)


def two_part_times(steps: int) -> Tensor:
    """Returns [steps + 1] times: two thirds of the steps from 1 down to 2/3, the rest down to 0."""
    early = round(steps * 2 / 3)
    if early in (0, steps):
        return linear_times(steps)
    return torch.cat([linear_times(early, 1.0, 2 / 3), linear_times(steps - early, 2 / 3, 0.0)[1:]])


def squared_times(steps: int) -> Tensor:
    """Returns the squares of [steps + 1] equally spaced times: the steps shrink towards the picture."""
    return linear_times(steps) ** 2


@dataclass(frozen=True)
class Schedule:
    """A named time schedule of Stage C, with the settings that it implies."""

    times: Callable[[int], Tensor]  # number of steps to times [steps + 1]
    steps: int | None = None  # of Stage C; None: any number
    sampler: str = "ddpm"  # of Stage C, a key of samplers.SAMPLERS
    decoder_steps: int | None = None  # of Stage B (v2); None: the default
    distilled: bool = False  # for distilled models, which state their own steps of both stages


# The nodes list them in this order: append new ones.
SCHEDULES = {
    "original": Schedule(two_part_times, 30),  # the original v2 notebook: 20 + 10 steps
    "diffusers": Schedule(two_part_times, 29),  # DEFAULT_STAGE_C_TIMESTEPS: 19 + 10 steps
    "linear": Schedule(linear_times),
    # Measured for the shipped demo only, which is as accurate with it as with 30 + 12 steps (docs/steps.md). Few steps
    # that each add noise sometimes fail, hence ddim.
    "fast": Schedule(squared_times, 6, "ddim", 4),
    "turbo": Schedule(linear_times, sampler="ddim", distilled=True),
}


def named_times(schedule: str, steps: int) -> Tensor:
    """Returns the times [N + 1] of a schedule by name; `steps` is ignored if the schedule has a fixed number."""
    check_choice("schedule", schedule, SCHEDULES)
    return SCHEDULES[schedule].times(SCHEDULES[schedule].steps or steps)


def strength_times(times: Tensor, strength: float) -> Tensor:
    """Returns times [N + 1] scaled to start at `strength` instead of 1, for image to image.

    For the linear schedule it equals ComfyUI's `denoise`. Raises ValueError unless `strength` is from 0 to 1.
    """
    if not 0 <= (strength := to_float("strength", strength)) <= 1:
        raise ValueError(f"strength {strength} cannot be used: choose a number from 0 (same picture) to 1 (a new one)")
    return times * strength


def decoder_times(steps: int, strength: float = 1.0) -> Tensor:
    """Returns [steps + 1] equally spaced times of v2's Stage B from `strength`, which a single step limits to 0.95.

    At 1 latents have a hundredth of the picture, and errors of the noise become a hundred times as large in it, which
    only further steps remove: rounding to bf16, and the network's limit of 0.999 for the share of noise. Errors as
    those of `linear_times` and `strength_times`.
    """
    times = strength_times(linear_times(steps), strength)
    return times if steps > 1 else times.clamp(max=SINGLE_STEP_START)
