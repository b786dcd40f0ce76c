"""The sampling of v1's Stage B: the core's walk along tokens inside the host's loading, progress and cancelling."""

from __future__ import annotations

from typing import Any

import comfy.model_management
import comfy.utils
import latent_preview
from torch import Tensor
from torch.nn.functional import embedding

from ...wuerstchen_core.diffusion.masks import latent_mask
from ...wuerstchen_core.diffusion.samplers import guidance
from ...wuerstchen_core.diffusion.schedule import strength_times
from ...wuerstchen_core.diffusion.token_sampler import SeededTokenNoise, renoise, sample_tokens
from ...wuerstchen_core.inference.settings import SamplingSettings
from ...wuerstchen_core.models.layers import nearest_codes
from .conditioning import token_cond
from .latents import STAGE_B, check_shape


def codebook_of(vae: Any, labels: int) -> Tensor:
    """The codes [labels, 4] of Stage A, ours or the host's own; ValueError if a VAE has others or none."""
    codes = getattr(vae, "codebook", None)  # ours; the host's own Stage A has it in its network alone
    if codes is None:
        codebook = getattr(getattr(vae.first_stage_model, "vquantizer", None), "codebook", None)
        codes = None if codebook is None else codebook.weight
    if codes is None or len(codes) != labels:
        found = "none" if codes is None else str(len(codes))
        raise ValueError(
            f"this token decoder chooses among {labels} codes of Stage A, and the VAE given has {found}: "
            "connect the Stage A that belongs to it"
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
    """Stage A latents [B, 4, H, W] of tokens painted by a token decoder; the same seed gives what the core gives.

    `sampling` says steps, guidance, temperatures and mode. Below a `denoise` of 1 it starts from the tokens nearest to
    the latents, that share of them random; at 0 nothing is painted. Where a mask keeps the picture, its tokens stay.
    """
    samples = latent["samples"]
    model, device = patcher.model, patcher.load_device
    params = model.diffusion_model.params
    check_shape(samples.shape, STAGE_B, "Stage B", params.multiple)
    times = strength_times(sampling.decoder_times(), denoise)
    guided = max(sampling.decoder_scales()) > 1
    cond = token_cond(params, positive, samples)
    uncond = token_cond(params, negative, samples, beside=cond) if guided else cond
    codebook = codebook_of(vae, params.num_labels)
    if not times[0]:
        return samples
    _load(patcher, (2 * len(samples), *samples.shape[1:]))  # without guidance, choosing tokens holds as much
    dtype = model.get_dtype_inference()
    wanted, unwanted = (tuple(x.to(device, dtype) for x in states) for states in (cond, uncond))
    codebook, samples = codebook.to(device), samples.to(device)

    def network(tokens: Tensor, t: Tensor, prior: Tensor, text: Tensor) -> Tensor:
        comfy.model_management.throw_exception_if_processing_interrupted()
        return model.diffusion_model(tokens, t, text, prior).float()

    draw = SeededTokenNoise(seed, latent.get("batch_index", len(samples)))
    noise = draw.tokens(len(codebook), *samples.shape[-2:]).to(device)
    mask = _mask_of(latent, samples)
    tokens = kept = noise
    if denoise < 1 or mask is not None:
        kept = nearest_codes(samples.float().movedim(1, -1).flatten(0, 2), codebook).view(noise.shape)
    if denoise < 1:
        tokens, _ = renoise(kept, noise, times[:1].to(device).expand(len(kept)), draw.uniform(kept))
    try:
        patcher.pre_run()
        tokens = sample_tokens(
            guidance(network, wanted, unwanted),
            tokens,
            times,
            noise=noise,
            draw=draw,
            codebook=codebook,
            scales=sampling.decoder_scales(),
            temperatures=sampling.temperatures(),
            mode=sampling.token_mode,
            init=None if mask is None else kept,
            mask=mask,
            callback=_progress(patcher, codebook, len(times) - 1),
        )
    finally:
        patcher.cleanup()
    return _latents_of(tokens, codebook).to(comfy.model_management.intermediate_device())


def _load(patcher: Any, shape: tuple[int, ...]) -> None:
    """Have the host make room for a call over latents of this shape, and bring the weights, or a part of them."""
    needed = patcher.model.memory_required(shape)
    comfy.model_management.load_models_gpu([patcher], memory_required=needed, minimum_memory_required=needed)


def _latents_of(tokens: Tensor, codebook: Tensor) -> Tensor:
    return embedding(tokens, codebook).movedim(-1, 1).contiguous()


def _mask_of(latent: dict[str, Any], samples: Tensor) -> Tensor | None:
    """Which tokens [B, H, W] are to be painted; None: all."""
    mask = latent.get("noise_mask")
    if mask is None:
        return None
    mask = latent_mask(mask.reshape(-1, 1, *mask.shape[-2:]), *samples.shape[-2:])
    return comfy.utils.repeat_to_batch_size(mask, len(samples))[:, 0].bool().to(samples.device)


def _progress(patcher: Any, codebook: Tensor, steps: int) -> Any:
    """The host's progress bar and preview, in the units that the decoder of v2 works in."""
    show = latent_preview.prepare_callback(patcher, steps)
    inside = patcher.model.latent_format.process_in

    def progress(step: int, steps: int, tokens: Tensor, chosen: Tensor) -> None:
        show(step, inside(_latents_of(chosen, codebook)), tokens, steps)

    return progress
