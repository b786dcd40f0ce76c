"""The frozen interface of every node, and the inputs of a node in ComfyUI's /object_info."""

from __future__ import annotations

from typing import Any

# Never change these: saved workflows depend on ids, inputs and outputs, and on their order. Append new ones.
NODES = {
    "WuerstchenBundleLoader": (
        "bundle",
        "prior:MODEL decoder:MODEL prior clip:CLIP decoder clip:CLIP vae:VAE image encoder:VAE",
    ),
    "WuerstchenTextEncode": ("prior_clip decoder_clip text", "prior:CONDITIONING decoder:CONDITIONING"),
    "WuerstchenEmptyLatents": ("width height batch_size", "stage_c:LATENT stage_b:LATENT"),
    "WuerstchenPriorSample": ("model positive negative stage_c schedule steps cfg seed denoise", "stage_c:LATENT"),
    "WuerstchenDecoderConditioning": ("conditioning stage_c", "conditioning:CONDITIONING"),
    "WuerstchenDecoderSample": ("model positive stage_b steps cfg seed negative denoise reuse", "stage_b:LATENT"),
    "WuerstchenVAEDecode": ("vae stage_b", "image:IMAGE"),
    "WuerstchenScheduler": ("model schedule steps", "sigmas:SIGMAS"),
    "WuerstchenSampler": ("sampler_name", "sampler:SAMPLER"),
    "WuerstchenQuickLook": ("stage_c scale", "image:IMAGE"),
    "WuerstchenModelLoader": ("model_name weight_dtype version", "model:MODEL"),
    "WuerstchenCLIPLoader": ("clip_name", "clip:CLIP"),
    "WuerstchenVAELoader": ("vae_name", "vae:VAE"),
    "WuerstchenLoraLoader": (
        "model lora_name strength_model strength_clip save_converted clip",
        "model:MODEL clip:CLIP",
    ),
    "WuerstchenImageEncode": ("image_encoder image vae mask", "stage_c:LATENT stage_b:LATENT"),
    "WuerstchenLatentInterpolate": ("first second factor", "latent:LATENT"),
    "WuerstchenConditioningInterpolate": ("first second factor", "conditioning:CONDITIONING"),
    "WuerstchenTokenDecoderLoader": ("model_name weight_dtype", "token decoder:WUERSTCHEN_TOKEN_DECODER"),
    "WuerstchenTokenDecoderSample": (
        "token_decoder positive stage_b vae steps cfg cfg_end temperature temperature_end mode seed negative denoise "
        "reuse",
        "stage_b:LATENT",
    ),
    "WuerstchenControlNetLoader": ("control_net_name", "ControlNet:CONTROL_NET"),
}


def list_inputs(info: dict[str, Any]) -> list[tuple[str, Any, dict[str, Any]]]:
    """Returns name, type and options of each input, in the order of the widgets."""
    return [
        (name, *(*info["input"][section][name], {})[:2])
        for section in ("required", "optional")
        for name in info["input_order"].get(section, [])
    ]
