"""Samplers as free functions over one protocol: `denoiser(x, t)` gives the noise in x [B, ...] at times t [B]."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from .schedule import alpha_bar, diffuse, expand

Denoiser = Callable[[Tensor, Tensor], Tensor]
NoiseSource = Callable[[Tensor], Tensor]  # noise of the shape, dtype and device of its argument
Seed = int | Sequence[int]  # of a batch: one number for seed, seed + 1, ..., or that of each picture


class Step(Protocol):
    """One step of a sampler: from x at times t [B] to the times t_next [B], given the predicted noise."""

    def __call__(self, x: Tensor, noise: Tensor, t: Tensor, t_next: Tensor, draw: NoiseSource) -> Tensor: ...


class Progress(Protocol):
    """Called after each step with its index, the number of steps, x, and the denoised x; may raise to stop."""

    def __call__(self, step: int, steps: int, x: Tensor, denoised: Tensor) -> None: ...


def predict_x0(x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """The picture that x would be without its noise (arXiv 2006.11239, equation 15)."""
    signal = expand(alpha_bar(t), x)
    return (x - (1 - signal).sqrt() * noise) / signal.sqrt()


def ddpm_step(x: Tensor, noise: Tensor, t: Tensor, t_next: Tensor, draw: NoiseSource) -> Tensor:
    """Ancestral step (arXiv 2006.11239, algorithm 2); no noise is added where t_next is 0."""
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
    """DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2). The first and the last step are of first order, as DDIM's.

    Keeps the previous step's prediction, so each run needs an instance of its own.
    """

    def __init__(self) -> None:
        self._previous: tuple[Tensor, Tensor] | None = None

    def __call__(self, x: Tensor, noise: Tensor, t: Tensor, t_next: Tensor, draw: NoiseSource) -> Tensor:
        signal, signal_next = expand(alpha_bar(t), x), expand(alpha_bar(t_next), x)
        x0 = target = predict_x0(x, noise, t)
        width = (signal_next.logit() - signal.logit()) / 2  # h, the step in half the log of signal to noise
        if self._previous is not None and bool(t_next.all()):
            x0_before, width_before = self._previous
            # Where alpha_bar is clamped, or a schedule repeats a time, the step before had no width.
            ratio = torch.where(width_before > 0, width / width_before, 0.0)
            target = x0 + (x0 - x0_before) * ratio / 2
        self._previous = x0, width
        return ((1 - signal_next) / (1 - signal)).sqrt() * x - signal_next.sqrt() * torch.expm1(-width) * target


# Factories of steps by name, called once per run. In the order of ComfyUI's choices: append new ones.
SAMPLERS: dict[str, Callable[[], Step]] = {
    "ddpm": lambda: ddpm_step,
    "ddim": lambda: ddim_step,
    "dpmpp_2m": DPMSolverPP2M,
}


def check_sampler(name: str) -> None:
    """Raises ValueError unless `name` is a sampler."""
    if name not in SAMPLERS:
        raise ValueError(f"sampler {name!r} is unknown: choose {', '.join(SAMPLERS)}")


def guidance(
    model: Callable[..., Tensor], cond: tuple[Tensor, ...], uncond: tuple[Tensor, ...]
) -> Callable[[Tensor, Tensor, float], Tensor]:
    """Classifier-free guidance (arXiv 2207.12598): both predictions, extrapolated by the scale given last.

    The model is called as model(x, t, *cond): once for both, or twice where their conditions differ in shape (texts of
    different lengths); where the scale is 1 the unconditional half is left out.
    """
    pairs = list(zip(cond, uncond, strict=True))
    alike = all(c.shape == u.shape for c, u in pairs)
    both = tuple(torch.cat(pair) for pair in pairs) if alike else ()

    def predict(x: Tensor, t: Tensor, scale: float) -> Tensor:
        if scale == 1.0:
            return model(x, t, *cond)
        if alike:
            wanted, unwanted = model(torch.cat([x, x]), torch.cat([t, t]), *both).chunk(2)
        else:
            wanted, unwanted = model(x, t, *cond), model(x, t, *uncond)
        return torch.lerp(unwanted, wanted, scale)

    return predict


def guided(
    model: Callable[..., Tensor], cond: tuple[Tensor, ...], uncond: tuple[Tensor, ...], scale: float
) -> Denoiser:
    """`guidance` by one scale."""
    predict = guidance(model, cond, uncond)
    return lambda x, t: predict(x, t, scale)


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
    """Samples x [B, ...] along times [N + 1] with a sampler of SAMPLERS; `draw` gives the noise of the steps.

    For image to image give x = diffuse(picture, times[0], noise). With `init` (a clean x) and `mask` (1: paint,
    0: keep), the kept part is `init`, noised to the time of each step: by `kept_noise`, the same all the way, as
    ComfyUI does it, or else by new noise from `draw`, as the original does.
    """
    if (init is None) != (mask is None):
        raise ValueError("init and mask belong together: give both, or neither")
    check_sampler(sampler)
    step, steps = SAMPLERS[sampler](), len(times) - 1
    for i in range(steps):
        t, t_next = (times[j].to(x.device).expand(x.shape[0]) for j in (i, i + 1))
        if init is not None and mask is not None:
            x = x * mask + diffuse(init, t, draw(x) if kept_noise is None else kept_noise) * (1 - mask)
        noise = denoiser(x, t)
        previous, x = x, step(x, noise, t, t_next, draw)
        if callback is not None:
            callback(i, steps, x, predict_x0(previous, noise, t))
    return x


def seeded_generators(seed: Seed, pictures: int | Sequence[int]) -> list[torch.Generator]:
    """One CPU generator a picture; `pictures`: their number, or their places in a batch."""
    places = range(pictures) if isinstance(pictures, int) else pictures
    return [torch.Generator().manual_seed(seed[i] if isinstance(seed, Sequence) else seed + i) for i in places]


def seeded_noise(seed: Seed, pictures: int | Sequence[int]) -> NoiseSource:
    """Noise from one CPU generator a picture: a batch equals its singles.

    `pictures` is how many there are, or the places that they had in the batch that they were taken from.
    """
    generators = seeded_generators(seed, pictures)

    def draw(like: Tensor) -> Tensor:
        rows = [torch.randn(like.shape[1:], generator=g, dtype=torch.float32) for g in generators]
        return torch.stack(rows).to(like)

    return draw
