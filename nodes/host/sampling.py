"""Würstchen's exact samplers inside ComfyUI's sampling, with its guidance, hooks, masks, progress and loading."""

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
from ...wuerstchen_core.inference.settings import LARGEST_SEED, SamplingSettings
from .feature_reuse import reusing
from .model_sampling import WuerstchenSampling


def sample_core(
    model: Any,
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any],
    callback: Callable[[dict[str, Any]], None] | None = None,
    disable: bool | None = None,
    *,
    draw: NoiseSource | None = None,
    start: Tensor | None = None,
    sampler: str = SamplingSettings.sampler,
) -> Tensor:
    """Runs the core's sampler with the signature of ComfyUI's samplers: x has variance 1 + sigma^2, `model` denoises.

    `draw` makes the steps' noise; by default from the run's seed + 1, since the initial noise used that seed.
    `start` [B, ...] of variance 1 replaces x, in which ComfyUI leaves 1/100 of the image.
    """
    schedule = model.inner_model.inner_model.model_sampling
    check_schedule(schedule)
    draw = draw or seeded_noise((extra_args["seed"] + 1) % (LARGEST_SEED - len(x)), len(x))
    times = torch.where(sigmas > 0, schedule.timestep(sigmas), torch.zeros_like(sigmas))

    step_sigmas, denoised = iter(torch.where(sigmas > 0, sigmas, schedule.sigma(times))), x

    def predict_noise(x: Tensor, t: Tensor) -> Tensor:
        nonlocal denoised
        comfy.model_management.throw_exception_if_processing_interrupted()
        sigma = next(step_sigmas).expand(len(x))  # exact, since DifferentialDiffusion compares it to the first
        scaled = x * (1 + expand(sigma, x) ** 2).sqrt()
        denoised = model(scaled, sigma, **extra_args)
        return (scaled - denoised) / expand(sigma, x)

    def progress(step: int, steps: int, x: Tensor, denoised: Tensor) -> None:
        if callback is not None:
            callback({"i": step, "x": x, "denoised": denoised, "sigma": sigmas[step], "sigma_hat": sigmas[step]})

    x = x / (1 + sigmas[0] ** 2).sqrt() if start is None else start.to(x) * schedule.noise_scale
    x = sample(predict_noise, x, times, draw=draw, sampler=sampler, callback=progress)
    mask = extra_args.get("denoise_mask")
    if mask is not None and sigmas[-1] == 0:  # without the last step's trace of noise; ComfyUI has mixed `denoised`
        x = torch.where(mask == 1, x, denoised)
    return x * (1 + sigmas[-1] ** 2).sqrt()  # ComfyUI's form of leftover noise, for a second run


def check_schedule(schedule: Any) -> None:
    """Raises ValueError unless a model's `model_sampling` is Würstchen's."""
    if not isinstance(schedule, WuerstchenSampling):
        raise ValueError(
            f"this model's noise schedule is {type(schedule).__name__}, not Würstchen's: connect the prior or decoder "
            "output of a Würstchen loader, without a ModelSampling node in between"
        )


def stage_sigmas(model: Any, times: Tensor) -> Tensor:
    """Returns the sigmas [N + 1] of a MODEL at times [N + 1], the last one 0; ValueError for other models."""
    schedule = model.get_model_object("model_sampling")
    check_schedule(schedule)
    sigmas = schedule.sigma(times)
    sigmas[-1] = 0.0
    return sigmas


def sampler_object(name: str) -> Any:
    """Returns a sampler of the core, by its name in SAMPLERS, as a SAMPLER."""
    return comfy.samplers.KSAMPLER(sample_core, {"sampler": name})


def sample_stage(
    model: Any,
    positive: Any,
    negative: Any,
    latent: dict[str, Any],
    times: Tensor,
    cfg: float,
    seed: int,
    *,
    from_noise: bool,
    sampler: str = SamplingSettings.sampler,
    reuse: int = 1,
) -> Tensor:
    """Samples latents [B, c, h, w] with a MODEL along times [N + 1]; the same seed gives the core's result.

    Sampling starts from the noised latents or, `from_noise`, from noise alone, except where a mask keeps the image.
    If times start at 0, the latents are returned as they are. `reuse`: one in so many steps of Stage B is full.
    """
    samples = latent["samples"]
    if not times[0]:
        return samples
    draw = seeded_noise(seed, latent.get("batch_index", len(samples)))  # set by ComfyUI's batch nodes
    noise = draw(samples)
    start = noise if from_noise else None
    sigmas = stage_sigmas(model, times)
    with reusing(model, reuse, sigmas) as model:
        return comfy.sample.sample_custom(
            model,
            noise,
            cfg,
            comfy.samplers.KSAMPLER(partial(sample_core, draw=draw, start=start, sampler=sampler)),
            sigmas,
            positive,
            negative,
            samples,
            noise_mask=latent.get("noise_mask"),
            callback=latent_preview.prepare_callback(model, len(times) - 1),
            seed=seed,
        )
