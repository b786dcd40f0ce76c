"""The stages of a model as functions of its components: tensors in, tensors out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ..checkpoints.release import trained_sides
from ..common.geometry import decoder_side, prior_side, size_note
from ..common.numbers import check_finite
from ..diffusion.samplers import Seed, guided, sample, seeded_noise
from ..diffusion.schedule import diffuse, strength_times
from ..diffusion.token_sampler import SeededTokenNoise, sample_tokens
from ..models.control_net import Control
from ..models.feature_reuse import FeatureReuse
from ..models.image_encoder import semantic_view
from ..models.prior import KVCache, features_from_latents, latents_from_features
from ..models.token_decoder import TokenDecoder
from .components import Components, first_weight
from .control import AnyHint, LoadedHints, load_hints
from .images import to_pictures
from .settings import Callback, SamplingSettings, sampler_progress

logger = logging.getLogger(__name__)

DENOISERS = ("prior", "decoder", "token_decoder")


def _warn_of_size(model: Components, sampling: SamplingSettings) -> None:
    """Logs a warning about a size that the prior was not trained for; each size only the first time."""
    trained = trained_sides(model.require("prior").params, model.metadata)
    size = prior_side(sampling.height), prior_side(sampling.width)
    if trained and size not in model.reported_sizes and (note := size_note(trained, *size)):
        model.reported_sizes.add(size)
        logger.warning(note)


@torch.inference_mode()
def sample_prior(
    model: Components,
    text: Tensor,
    sampling: SamplingSettings,
    *,
    negative: Tensor | None = None,
    seed: Seed = 0,
    callback: Callback | None = None,
    init: Tensor | None = None,
    mask: Tensor | None = None,
    strength: float = 1.0,
    control: AnyHint | Sequence[AnyHint] | LoadedHints | None = None,
) -> Tensor:
    """Runs Stage C: text states [B, 77 n, c] to features [B, 16, h, w], in the image encoder's units.

    Guidance leads away from the text states `negative` (default: those of ""). With the features `init` of a picture,
    sampling starts from them, noised to `strength` (0 returns them, 1 ignores them), and keeps them where `mask`
    [B, 1, h, w] is 0, or a part of them where it is below 1. Picture i has seed `seed` + i, or `seed[i]`. `control` is
    as in `generate`.
    """
    params = model.require("prior").params
    times = strength_times(sampling.prior_times(), strength)
    hints = load_hints(model, control, sampling, len(text), strength=strength)
    if init is not None and strength == 0:
        return init
    _warn_of_size(model, sampling)
    if negative is None and sampling.prior_guidance > 1:
        negative = _encode_empty(model, "prior")
    with model.using("prior") as prior:
        hints.check_prior(prior)
        text = text.to(first_weight(prior))
        scale, cond, uncond = max(sampling.prior_guidance, 1.0), (text,), (text,)
        if scale > 1:
            assert negative is not None
            uncond = (negative.to(text).expand(len(text), -1, -1),)
        to_features = partial(features_from_latents, params=params)
        draw = seeded_noise(seed, len(text))
        shape = (len(text), params.c_in, prior_side(sampling.height), prior_side(sampling.width))
        x = noise = draw(torch.empty(shape, device=text.device))
        init, mask = (None if y is None else y.to(text.device) for y in (init, mask))
        clean = None if init is None else latents_from_features(init, params)
        if clean is not None and strength < 1:  # at 1 a hundredth of the picture would remain
            x = diffuse(clean, times[:1].to(x.device).expand(len(x)), noise)
        x = sample(
            guided(in_fp32(prior, KVCache(prior), control=hints or None), cond, uncond, scale),
            x,
            times,
            draw=draw,
            sampler=sampling.sampler,
            init=None if mask is None else clean,
            mask=mask,
            kept_noise=noise,
            callback=sampler_progress(callback, "prior", to_features),
        )
        features = check_finite("Stage C", to_features(x))
        return features if init is None or mask is None else torch.where(mask > 0, features, init)


@torch.inference_mode()
def sample_decoder(
    model: Components,
    features: Tensor,
    text: Tensor,
    sampling: SamplingSettings,
    *,
    negative: Tensor | None = None,
    seed: Seed = 0,
    callback: Callback | None = None,
    init: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Runs Stage B: features [B, 16, h, w] and text states [B, 77 n, c] to Stage A latents [B, 4, H/4, W/4].

    Latents are in codebook units. Guidance leads away from zero features and the text states `negative` (default: those
    of ""). Latents `init` and `mask` [B, 1, H/4, W/4] as in `sample_prior`, seeds too.
    """
    if negative is None and max(sampling.decoder_scales()) > 1:
        negative = _encode_empty(model, "decoder")
    with model.using(model.stage_b) as decoder:
        device = first_weight(decoder).device
        text, features = text.to(first_weight(decoder)), features.to(device)  # features are resized in fp32
        cond, uncond = (features, text), (features, text)
        if max(sampling.decoder_scales()) > 1:
            assert negative is not None
            uncond = (torch.zeros_like(features), negative.to(text).expand(len(text), -1, -1))
        times = sampling.decoder_times()
        reuse = FeatureReuse(sampling.decoder_reuse, times.tolist()) if sampling.decoder_reuse > 1 else None
        predict = guided(in_fp32(decoder, reuse=reuse), cond, uncond)
        height, width = decoder_side(sampling.height), decoder_side(sampling.width)
        if isinstance(decoder, TokenDecoder):
            with model.using("vqgan") as vqgan:
                codebook = vqgan.vquantizer.codebook.weight
                token_draw = SeededTokenNoise(seed, len(text))
                tokens = token_draw.tokens(len(codebook), height, width).to(device)
                tokens = sample_tokens(
                    predict,
                    tokens,
                    times,
                    noise=tokens,
                    draw=token_draw,
                    codebook=codebook,
                    scales=sampling.decoder_scales(),
                    temperatures=sampling.temperatures(),
                    mode=sampling.token_mode,
                    init=None if init is None else vqgan.quantize(init).indices,
                    mask=None if mask is None else mask.squeeze(1).expand(tokens.shape),
                    callback=sampler_progress(callback, "decoder", vqgan.indices_to_latents),
                )
                return vqgan.indices_to_latents(tokens)
        scale_factor, draw = model.require("vqgan").params.scale_factor, seeded_noise(seed, len(text))
        noise = draw(torch.empty((len(text), decoder.params.c_in, height, width), device=device))
        scales = iter(sampling.decoder_scales())
        x = sample(
            lambda x, t: predict(x, t, next(scales)),
            noise,
            times,
            draw=draw,
            init=None if init is None else init / scale_factor,
            mask=mask,
            kept_noise=noise,
            callback=sampler_progress(callback, "decoder", lambda latents: latents * scale_factor),
        )
        latents = check_finite("Stage B", x * scale_factor)
        return latents if init is None or mask is None else torch.where(mask > 0, latents, init)


def _encode_empty(model: Components, stage: str) -> Tensor:
    """Returns the text states [1, 77, c] of "" for the "prior" or "decoder"."""
    with model.using(f"{stage}_text_encoder") as encoder:
        states: Tensor = encoder.encode([""])
    return states


@torch.inference_mode()
def decode(model: Components, latents: Tensor) -> list[Image.Image]:
    """Runs Stage A: latents [B, 4, H/4, W/4] in codebook units to pictures, one at a time to save memory."""
    with model.using("vqgan") as vqgan:
        latents = latents.to(first_weight(vqgan))
        return [
            picture for one in latents.split(1) for picture in to_pictures(check_finite("Stage A", vqgan.decode(one)))
        ]


def encode_pixels(model: Components, pixels: Tensor) -> Tensor:
    """Returns the Stage C features [B, 16, h, w] of pixels [B, 3, H, W] in [0, 1]."""
    with model.using("image_encoder") as encoder:
        features: Tensor = encoder(semantic_view(pixels.to(first_weight(encoder)))).float()
    return check_finite("the image encoder", features)


def in_fp32(
    network: nn.Module,
    read: Callable[[Tensor], Any] = lambda text: text,
    reuse: FeatureReuse | None = None,
    control: Callable[[Tensor], Control] | None = None,
) -> Callable[..., Tensor]:
    """Returns a denoiser for samplers in fp32: inputs are cast to the network's dtype, its output to fp32.

    `read` is applied to the text states, its last argument. With `reuse`, a U-Net keeps its deep features for each
    conditioning; its tensors must then live as long as the denoiser. `control` returns what a prior's ControlNets add.
    """
    dtype = first_weight(network).dtype

    def model(x: Tensor, t: Tensor, *cond: Tensor) -> Tensor:
        *others, text = cond
        extra: dict[str, Any] = {} if reuse is None else {"deep": reuse.call(float(t[0]), (id(text), x.shape))}
        extra |= {} if control is None else {"control": control(t)}
        return network(x.to(dtype) if x.is_floating_point() else x, t, *others, read(text), **extra).float()

    return model
