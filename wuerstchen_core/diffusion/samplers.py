"""Samplers as free functions over one protocol: `denoiser(x, t)` predicts the noise in x [B, ...] at times t [B]."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..common.numbers import plain, to_int
from ..common.text import check_choice
from .schedule import alpha_bar, diffuse, expand

Denoiser = Callable[[Tensor, Tensor], Tensor]
NoiseSource = Callable[[Tensor], Tensor]  # returns noise of its argument's shape, dtype and device
Step = Callable[[Tensor, Tensor, Tensor, Tensor, NoiseSource], Tensor]  # (x, noise, t [B], t_next [B], draw) to x
Progress = Callable[[int, int, Tensor, Tensor], None]  # step, steps, x, denoised x, after each step; may raise to stop
Seed = int | Sequence[int]  # n for n, n + 1, ... in a batch, or one number per picture
LARGEST_SEED = 2**63 - 1  # of a torch generator, on every system


def predict_x0(x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Returns x without its noise (arXiv 2006.11239, equation 15)."""
    signal = expand(alpha_bar(t), x)
    return (x - (1 - signal).sqrt() * noise) / signal.sqrt()


def noise_in(x: Tensor, x0: Tensor, t: Tensor) -> Tensor:
    """Returns the noise that turned x0 into x; the inverse of `predict_x0`."""
    signal = expand(alpha_bar(t), x)
    return (x - signal.sqrt() * x0) / (1 - signal).sqrt()


def ddpm_step(x: Tensor, noise: Tensor, t: Tensor, t_next: Tensor, draw: NoiseSource) -> Tensor:
    """Ancestral step (arXiv 2006.11239, algorithm 2); adds no noise where t_next is 0."""
    signal, signal_next = expand(alpha_bar(t), x), expand(alpha_bar(t_next), x)
    alpha = signal / signal_next
    mean = (1.0 / alpha).sqrt() * (x - (1 - alpha) * noise / (1 - signal).sqrt())
    std = ((1 - alpha) * (1.0 - signal_next) / (1.0 - signal)).sqrt()
    return mean + std * draw(x) * expand(t_next != 0, x)


def ddim_step(x: Tensor, noise: Tensor, t: Tensor, t_next: Tensor, draw: NoiseSource) -> Tensor:
    """Deterministic step (arXiv 2010.02502, equation 12 with sigma 0)."""
    signal_next = expand(alpha_bar(t_next), x)
    return signal_next.sqrt() * predict_x0(x, noise, t) + (1 - signal_next).sqrt() * noise


class DPMSolverPP2M:
    """DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2). The first step and a last one to t = 0 equal DDIM's.

    Create one instance per run: it remembers the previous step's prediction.
    """

    def __init__(self) -> None:
        self._previous: tuple[Tensor, Tensor] | None = None

    def __call__(self, x: Tensor, noise: Tensor, t: Tensor, t_next: Tensor, draw: NoiseSource) -> Tensor:
        signal, signal_next = expand(alpha_bar(t), x), expand(alpha_bar(t_next), x)
        x0 = target = predict_x0(x, noise, t)
        width = (signal_next.logit() - signal.logit()) / 2  # h: the step in lambda, half the log of signal to noise
        if self._previous is not None and bool(t_next.all()):
            x0_before, width_before = self._previous
            # A step has no width where alpha_bar is clamped or the schedule repeats a time.
            ratio = torch.where(width_before > 0, width / width_before, 0.0)  # 1 / r
            target = x0 + (x0 - x0_before) * ratio / 2
        self._previous = x0, width
        return ((1 - signal_next) / (1 - signal)).sqrt() * x - signal_next.sqrt() * torch.expm1(-width) * target


# Factories by name, called once per run. The nodes list them in this order: append new ones.
SAMPLERS: dict[str, Callable[[], Step]] = {
    "ddpm": lambda: ddpm_step,
    "ddim": lambda: ddim_step,
    "dpmpp_2m": DPMSolverPP2M,
}


def guided(
    model: Callable[..., Tensor], cond: tuple[Tensor, ...], uncond: tuple[Tensor, ...], scale: float = 1.0
) -> Callable[..., Tensor]:
    """Returns the model with classifier-free guidance (arXiv 2207.12598), to call with x, t and, if it varies, a scale.

    The model is called as model(x, t, *cond): once for both conditions, or twice if their shapes differ (texts of
    different lengths). At scale 1 it is called without the unconditional one.
    """
    pairs = list(zip(cond, uncond, strict=True))
    same_shapes = all(c.shape == u.shape for c, u in pairs)
    both = tuple(torch.cat(pair) for pair in pairs) if same_shapes else ()

    def predict(x: Tensor, t: Tensor, scale: float = scale) -> Tensor:
        if scale == 1.0:
            return model(x, t, *cond)
        if same_shapes:
            cond_out, uncond_out = model(torch.cat([x, x]), torch.cat([t, t]), *both).chunk(2)
        else:
            cond_out, uncond_out = model(x, t, *cond), model(x, t, *uncond)
        return torch.lerp(uncond_out, cond_out, scale)

    return predict


def sample(
    denoiser: Denoiser,
    x: Tensor,
    times: Tensor,
    *,
    draw: NoiseSource,
    sampler: str = "ddpm",
    init: Tensor | None = None,
    mask: Tensor | None = None,
    kept_noise: Tensor | None = None,
    callback: Progress | None = None,
) -> Tensor:
    """Samples x [B, ...] along times [N + 1] with one of SAMPLERS, whose steps take their noise from `draw`.

    For image to image start from x = diffuse(picture, times[0], noise). With `init` (a clean x) and `mask`
    (1: generate, 0: keep), the kept part is `init` noised to the time of each step: by new noise from `draw`, as the
    original does, or by `kept_noise` in all steps, as ComfyUI does. Then a mask between 0 and 1 mixes `init` into the
    denoiser's input and into its prediction. Raises ValueError for an unknown sampler.
    """
    if (init is None) != (mask is None):
        raise ValueError("init and mask belong together: give both or neither")
    check_choice("sampler", sampler, SAMPLERS)
    step, steps = SAMPLERS[sampler](), len(times) - 1
    x0: Tensor | None = None
    for i in range(steps):
        t, t_next = (times[j].to(x.device).expand(x.shape[0]) for j in (i, i + 1))
        if init is None or mask is None:
            noise = denoiser(x, t)
        elif kept_noise is None:
            x = x * mask + diffuse(init, t, draw(x)) * (1 - mask)
            noise = denoiser(x, t)
        else:
            mixed = x * mask + diffuse(init, t, kept_noise) * (1 - mask)
            noise = denoiser(mixed, t)
            x0 = predict_x0(mixed, noise, t) * mask + init * (1 - mask)
            noise = torch.where(mask == 1, noise, noise_in(x, x0, t))
        previous, x = x, step(x, noise, t, t_next, draw)
        if callback is not None:
            callback(i, steps, x, predict_x0(previous, noise, t))
    if x0 is not None and mask is not None and not times[-1]:  # exactly, without the last step's trace of noise
        x = torch.where(mask == 1, x, x0)
    return x


def plain_seed(seed: Any) -> Seed:
    """Returns a seed as int, several as a list, also from numpy and torch. ValueError unless all are whole numbers."""
    seed = plain(seed)
    if isinstance(seed, Sequence) and not isinstance(seed, str | bytes):
        return [to_int("seed", number) for number in seed]
    return to_int("seed", seed)


def seeded_generators(seed: Seed, pictures: int | Sequence[int]) -> list[torch.Generator]:
    """Returns one CPU generator per picture; `pictures` is their number, or their indices in a larger batch.

    Raises ValueError unless all seeds are from 0 to LARGEST_SEED.
    """
    seed = plain_seed(seed)
    indices = range(pictures) if isinstance(pictures, int) else pictures
    numbers = [seed[i] if isinstance(seed, Sequence) else seed + i for i in indices]
    for number in numbers:
        if not 0 <= number <= LARGEST_SEED:
            raise ValueError(f"seed {number} cannot be used: choose a number from 0 to {LARGEST_SEED}")
    return [torch.Generator().manual_seed(number) for number in numbers]


def seeded_noise(seed: Seed, pictures: int | Sequence[int]) -> NoiseSource:
    """Returns a source of noise with one CPU generator per picture, so that a batch equals its singles.

    `pictures` as in `seeded_generators`.
    """
    generators = seeded_generators(seed, pictures)

    def draw(like: Tensor) -> Tensor:
        rows = [torch.randn(like.shape[1:], generator=g, dtype=torch.float32) for g in generators]
        return torch.stack(rows).to(like)

    return draw
