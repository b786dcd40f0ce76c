"""Würstchen's exact DDPM inside the host's own sampling: its guidance, hooks, masks, progress and loading."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.samplers
import latent_preview
import torch
from torch import Tensor

from ...wuerstchen_core.diffusion.samplers import NoiseSource, sample, seeded_noise
from ...wuerstchen_core.diffusion.schedule import expand


def sample_ddpm(
    model: Any,
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any],
    callback: Callable[[dict[str, Any]], None] | None = None,
    disable: bool | None = None,
    *,
    draw: NoiseSource,
) -> Tensor:
    """The core's sampler as the host calls samplers: x has variance 1 + sigma^2, `model` denoises it."""
    schedule = model.inner_model.inner_model.model_sampling
    times = torch.where(sigmas > 0, schedule.timestep(sigmas), torch.zeros_like(sigmas))

    def noise_in(x: Tensor, t: Tensor) -> Tensor:
        comfy.model_management.throw_exception_if_processing_interrupted()
        sigma = schedule.sigma(t)
        wide = x * (1 + expand(sigma, x) ** 2).sqrt()
        return (wide - model(wide, sigma, **extra_args)) / expand(sigma, x)

    def progress(step: int, steps: int, x: Tensor, denoised: Tensor) -> None:
        if callback is not None:
            callback({"i": step, "x": x, "denoised": denoised, "sigma": sigmas[step], "sigma_hat": sigmas[step]})

    return sample(noise_in, x / (1 + sigmas[0] ** 2).sqrt(), times, draw=draw, callback=progress)


def sample_stage(
    model: Any, positive: Any, negative: Any, latent: dict[str, Any], times: Tensor, cfg: float, seed: int
) -> Tensor:
    """Latents [B, c, h, w] painted by a MODEL along times [N + 1]; the same seed gives what the core gives."""
    samples = latent["samples"]
    draw = seeded_noise(seed, samples.shape[0])
    sigmas = model.get_model_object("model_sampling").sigma(times)
    sigmas[-1] = 0.0
    return comfy.sample.sample_custom(
        model,
        draw(samples),
        cfg,
        comfy.samplers.KSAMPLER(partial(sample_ddpm, draw=draw)),
        sigmas,
        positive,
        negative,
        samples,
        noise_mask=latent.get("noise_mask"),
        callback=latent_preview.prepare_callback(model, len(times) - 1),
        seed=seed,
    )
