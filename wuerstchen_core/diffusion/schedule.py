"""The cosine noise schedule in continuous time, and the published time schedules by name.

t = 1 is noise, t = 0 the picture. Source: Nichol & Dhariwal, arXiv 2102.09672, equation 17, as the original uses it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

S = 0.008
ALPHA_BAR_MIN, ALPHA_BAR_MAX = 1e-4, 0.9999
FAST_STEPS = 6, 4  # of Stage C and of Stage B
MOST_STEPS = 10_000  # above which it is a slip, that would fill the memory


def alpha_bar(t: Tensor, scaler: float = 1.0) -> Tensor:
    """Share of signal variance at times t, any shape, clamped to [1e-4, 0.9999].

    A `scaler` above (below) 1 bends time so that more of the schedule is spent near noise (the picture).
    """
    if scaler > 1:
        t = 1 - (1 - t) ** scaler
    elif scaler < 1:
        t = t**scaler
    s = torch.tensor(S, dtype=t.dtype, device=t.device)
    start = torch.cos(s / (1 + s) * math.pi * 0.5) ** 2
    return (torch.cos((t + s) / (1 + s) * math.pi * 0.5) ** 2 / start).clamp(ALPHA_BAR_MIN, ALPHA_BAR_MAX)


def expand(per_sample: Tensor, like: Tensor) -> Tensor:
    """[B] to [B, 1, 1, ...] with as many dimensions as `like`."""
    return per_sample.view(-1, *[1] * (like.dim() - 1))


def diffuse(x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """x0 [B, ...] with noise mixed in up to times t [B] (arXiv 2006.11239, equation 4)."""
    signal = expand(alpha_bar(t), x0)
    return signal.sqrt() * x0 + (1 - signal).sqrt() * noise


def p2_weight(t: Tensor, k: float = 1.0, gamma: float = 1.0, scaler: float = 1.0) -> Tensor:
    """Loss weight at times t (arXiv 2204.00227, equation 8): 1 - alpha_bar at the defaults, which Würstchen uses."""
    signal = alpha_bar(t, scaler)
    return (k + signal / (1 - signal)) ** -gamma


def training_times(uniform: Tensor) -> Tensor:
    """The original's training times from uniform draws in [0, 1): 7.5 % of them are exactly 1."""
    return (1 - uniform).mul(1.08).add(0.001).clamp(0.001, 1.0)


def linear_times(steps: int, start: float = 1.0, end: float = 0.0) -> Tensor:
    """`steps` equal steps from start to end: [steps + 1] times."""
    if steps < 1:
        raise ValueError(f"{steps} sampling steps were asked for: at least 1 is needed")
    if steps > MOST_STEPS:
        raise ValueError(f"{steps} sampling steps were asked for: at most {MOST_STEPS} can be taken")
    return torch.linspace(start, end, steps + 1)


def original_times() -> Tensor:
    """Stage C of the original v2 notebook: 20 steps down to 2/3, then 10 down to 0."""
    return torch.cat([linear_times(20, 1.0, 2 / 3), linear_times(10, 2 / 3, 0.0)[1:]])


def diffusers_times() -> Tensor:
    """Stage C of diffusers' DEFAULT_STAGE_C_TIMESTEPS: 30 points, so 29 steps."""
    return torch.cat([linear_times(19, 1.0, 2 / 3), linear_times(10, 2 / 3, 0.0)[1:]])


def fast_times() -> Tensor:
    """Stage C in few steps: equal ones, squared, so that they shrink towards the picture, where they are needed.

    Along it by DDIM, and with 4 equal steps of Stage B, the shipped demo is as accurate as with 30 + 12:
    docs/steps.md. It was measured for no other weights.
    """
    return linear_times(FAST_STEPS[0]) ** 2


def named_times(schedule: str, steps: int) -> Tensor:
    """Times of a schedule by name: 'original', 'diffusers' and 'fast' (fixed), or 'linear' with `steps` steps."""
    if schedule == "linear":
        return linear_times(steps)
    fixed = {"original": original_times, "diffusers": diffusers_times, "fast": fast_times}
    if schedule not in fixed:
        raise ValueError(f"schedule {schedule!r} is unknown: choose original, diffusers, fast or linear")
    return fixed[schedule]()


def strength_times(times: Tensor, strength: float) -> Tensor:
    """A schedule [N + 1] that starts at `strength` instead of 1, in as many steps and of the same shape.

    Of the linear schedule this is what ComfyUI's `denoise` makes. Raises ValueError where it is not from 0 to 1.
    """
    if not 0 <= strength <= 1:
        raise ValueError(
            f"a strength of {strength} cannot be used: choose a number from 0 (the picture as it is) to 1 (a new one)"
        )
    return times * strength
