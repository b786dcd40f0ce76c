"""Samples Stage B of v1: the core's token sampler with ComfyUI's loading, progress and cancelling."""

from __future__ import annotations

from typing import Any

import comfy.model_management
import comfy.utils
import latent_preview
from torch import Tensor
from torch.nn.functional import embedding

from ...wuerstchen_core.diffusion.samplers import guided
from ...wuerstchen_core.diffusion.schedule import strength_times
from ...wuerstchen_core.diffusion.token_sampler import SeededTokenNoise, renoise, sample_tokens
from ...wuerstchen_core.inference.settings import SamplingSettings
from ...wuerstchen_core.models.feature_reuse import FeatureReuse
from ...wuerstchen_core.models.layers import nearest_codes
from .conditioning import token_cond
from .feature_reuse import REUSE
from .latents import STAGE_B, check_shape
from .masks import grid_mask


def codebook_of(vae: Any, labels: int) -> Tensor:
    """Returns the codebook [labels, 4] of Stage A, loaded by this pack or by ComfyUI; ValueError if it has another."""
    codes = getattr(vae, "codebook", None)
    if codes is None:  # ComfyUI's Stage A
        codebook = getattr(getattr(vae.first_stage_model, "vquantizer", None), "codebook", None)
        codes = None if codebook is None else codebook.weight
    if codes is None or len(codes) != labels:
        raise ValueError(
            f"this token decoder needs a Stage A with {labels} codes, and this VAE has "
            f"{'none' if codes is None else len(codes)}: connect the Stage A that belongs to it"
        )
    return codes.detach().float()


def sample_token_stage(
    patcher: Any,
    vae: Any,
    positive: Any,
    negative: Any,
    latent: dict[str, Any],
    sampling: SamplingSettings,
    seed: int,
    denoise: float = 1.0,
) -> Tensor:
    """Samples Stage A latents [B, 4, H, W] with a token decoder; the same seed gives the core's result.

    `sampling` has steps, guidance, temperatures and mode. Below a `denoise` of 1, it starts from the latents' nearest
    tokens, with that fraction of them random; at 0 the latents are returned as they are. Tokens outside the latent's
    mask are kept, and those where it is below 1 in the first steps: its value is the denoise there.
    """
    samples = latent["samples"]
    model, device = patcher.model, patcher.load_device
    check_shape(samples.shape, STAGE_B, "Stage B", model.params.multiple)
    times = strength_times(sampling.decoder_times(), denoise)
    cond = token_cond(model.params, positive, samples)
    uncond = token_cond(model.params, negative, samples, cond) if max(sampling.decoder_scales()) > 1 else cond
    codebook = codebook_of(vae, model.params.num_labels)
    if not times[0]:
        return samples
    needed = model.memory_required((2 * len(samples), *samples.shape[1:]))  # choosing tokens needs both halves anyway
    comfy.model_management.load_models_gpu([patcher], memory_required=needed, minimum_memory_required=needed)
    dtype = model.get_dtype_inference()
    conds = [tuple(x.to(device, dtype) for x in states) for states in (cond, uncond)]
    codebook, samples = codebook.to(device), samples.to(device)
    reuse = FeatureReuse(sampling.decoder_reuse, times.tolist()) if sampling.decoder_reuse > 1 else None

    def network(tokens: Tensor, t: Tensor, prior: Tensor, text: Tensor) -> Tensor:
        comfy.model_management.throw_exception_if_processing_interrupted()
        # `guided` passes the same tensors in each step.
        options = None if reuse is None else {REUSE: reuse, "uuids": [id(text)], "sigmas": t}
        return model.diffusion_model(tokens, t, text, stable_cascade_prior=prior, transformer_options=options).float()

    def decode(tokens: Tensor) -> Tensor:
        return embedding(tokens, codebook).movedim(-1, 1).contiguous()

    show = latent_preview.prepare_callback(patcher, len(times) - 1)

    def progress(step: int, steps: int, x: Tensor, denoised: Tensor) -> None:
        show(step, model.latent_format.process_in(decode(denoised)), x, steps)  # previews use v2's units

    draw = SeededTokenNoise(seed, latent.get("batch_index", len(samples)))
    noise = draw.tokens(len(codebook), *samples.shape[-2:]).to(device)
    mask = _token_mask(latent, samples)
    tokens = init = noise
    if denoise < 1 or mask is not None:
        init = nearest_codes(samples.float().movedim(1, -1).flatten(0, 2), codebook).view(noise.shape)
    if denoise < 1:
        tokens, _ = renoise(init, noise, times[:1].to(device).expand(len(init)), draw.uniform(init))
    try:
        patcher.pre_run()
        tokens = sample_tokens(
            guided(network, conds[0], conds[1]),
            tokens,
            times,
            noise=noise,
            draw=draw,
            codebook=codebook,
            scales=sampling.decoder_scales(),
            temperatures=sampling.temperatures(),
            mode=sampling.token_mode,
            init=None if mask is None else init,
            mask=mask,
            callback=progress,
        )
    finally:
        patcher.cleanup()
    return decode(tokens).to(comfy.model_management.intermediate_device())


def _token_mask(latent: dict[str, Any], samples: Tensor) -> Tensor | None:
    """Returns the mask [B, H, W] of the tokens; None if there is none."""
    mask = latent.get("noise_mask")
    if mask is None:
        return None
    mask = grid_mask(mask, samples.shape[-2:])
    return comfy.utils.repeat_to_batch_size(mask, len(samples))[:, 0].to(samples.device)
