"""Names of keyword arguments: explains those of other libraries, and suggests the nearest for unknown ones."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from difflib import get_close_matches
from functools import wraps
from inspect import signature
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

# What other libraries (mostly diffusers) call our arguments. The names that a function has are suggested.
ALIASES = {
    "negative_prompt": ("negative",),
    "negative_prompts": ("negative",),
    "num_inference_steps": ("prior_steps", "decoder_steps"),
    "prior_num_inference_steps": ("prior_steps",),
    "decoder_num_inference_steps": ("decoder_steps",),
    "steps": ("prior_steps", "decoder_steps"),
    "guidance_scale": ("prior_guidance", "decoder_guidance"),
    "prior_guidance_scale": ("prior_guidance",),
    "decoder_guidance_scale": ("decoder_guidance",),
    "cfg": ("prior_guidance", "decoder_guidance"),
    "cfg_scale": ("prior_guidance", "decoder_guidance"),
    "timesteps": ("schedule",),
    "prior_timesteps": ("schedule",),
    "scheduler": ("schedule", "sampler"),
    "generator": ("seed",),
    "latents": ("seed",),
    "num_images_per_prompt": ("count",),
    "num_images": ("count",),
    "num_samples": ("count",),
    "batch_size": ("count",),
    "callback_on_step_end": ("callback",),
    "callback_on_step_end_tensor_inputs": ("callback",),
    "prior_callback_on_step_end": ("callback",),
    "callback_steps": ("callback",),
    "show_progress": ("progress",),
    "size": ("width", "height"),
    "resolution": ("width", "height"),
    "init_image": ("image",),
    "images": ("image",),
    "mask_image": ("mask",),
    "denoise": ("strength",),
    "denoising_strength": ("strength",),
    "torch_dtype": ("dtype",),
    "variant": ("dtype",),
    "device_map": ("device",),
    "pretrained_model_name_or_path": ("source",),
    "model": ("source",),
    "checkpoint": ("source",),
    "path": ("source",),
    "vae": ("vqgan",),
    "unet": ("prior", "decoder"),
    "prior_prior": ("prior",),
    "effnet": ("image_encoder",),
    "prior_image_processor": ("image_encoder",),
    "loras": ("lora",),
    "lora_scale": ("strength", "lora"),
    "adapter_name": ("name",),
    "adapter_names": ("name",),
    "adapter_weights": ("strength",),
    "weight": ("strength",),
    "weights": ("strength",),
    "scale": ("strength",),
    "save_directory": ("path",),
    "lora_weights": ("lora",),
    "controlnet": ("control",),
    "control_image": ("control",),
    "controlnet_conditioning_scale": ("control",),
}


def check_keywords(function: str, given: Iterable[str], known: Collection[str]) -> None:
    """Raises ValueError for the first keyword that is not in `known`; names the argument to use instead."""
    for name in given:
        if name in known:
            continue
        use = [alias for alias in ALIASES.get(name, ()) if alias in known] or get_close_matches(name, known, n=1)
        advice = f"use {' or '.join(use)}" if use else f"choose from {', '.join(known)}"
        raise ValueError(f"{function} has no argument {name!r}: {advice}")


def named_arguments(function: Callable[P, T]) -> Callable[P, T]:
    """Returns a function or method that of a model that explains unknown keywords, as `check_keywords`."""
    known = list(signature(function).parameters)[1:]  # the first is the model

    @wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> T:
        check_keywords(function.__name__, kwargs, known)
        return function(*args, **kwargs)

    return checked
