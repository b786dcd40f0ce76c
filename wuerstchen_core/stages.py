"""A model's networks, and its stages one by one: tensors in, tensors out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor, nn

from .checkpoints import PARTS
from .diffusion.samplers import guided, sample, seeded_noise
from .diffusion.sizes import decoder_side, prior_side
from .models.decoder import Decoder
from .models.image_encoder import ImageEncoder, semantic_view
from .models.prior import Prior, features_from_latents
from .models.text_encoder import TextEncoder
from .models.vqgan import VQGAN
from .pictures import to_pictures
from .sampling import Callback, Sampling, sampler_progress

T = TypeVar("T")


class Stages:
    """The networks of one model. Any may be None: what needs it says so, the rest works."""

    def __init__(
        self,
        *,
        prior: Prior | None = None,
        decoder: Decoder | None = None,
        vqgan: VQGAN | None = None,
        image_encoder: ImageEncoder | None = None,
        prior_text_encoder: TextEncoder | None = None,
        decoder_text_encoder: TextEncoder | None = None,
        metadata: Mapping[str, Any] | None = None,
    ):
        self.prior = prior
        self.decoder = decoder
        self.vqgan = vqgan
        self.image_encoder = image_encoder
        self.prior_text_encoder = prior_text_encoder
        self.decoder_text_encoder = decoder_text_encoder
        self.metadata = dict(metadata or {})
        self.sampling = Sampling.of(self.metadata)

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        networks = (getattr(self, name) for name in PARTS)
        return weight_of(need(next((x for x in networks if x is not None), None), "network")).device

    @torch.inference_mode()
    def encode_text(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Prompts of one n to text states [B, 77 n, c]: what the prior reads, and what the decoder reads."""
        prior = self.states(self.prior_text_encoder, "prior_text_encoder", prompts)
        if self.prior_text_encoder is self.decoder_text_encoder:
            return prior, prior
        return prior, self.states(self.decoder_text_encoder, "decoder_text_encoder", prompts)

    @torch.inference_mode()
    def sample_prior(
        self,
        text: Tensor,
        sampling: Sampling,
        *,
        negative: Tensor | None = None,
        seed: int = 0,
        callback: Callback | None = None,
    ) -> Tensor:
        """Stage C: text states [B, 77 n, c] to features [B, 16, h, w]; guided away from `negative` (default: "")."""
        prior = need(self.prior, "prior")
        text = text.to(weight_of(prior))
        scale, cond, uncond = max(sampling.prior_guidance, 1.0), (text,), (text,)
        if scale > 1:
            if negative is None:
                negative = self.states(self.prior_text_encoder, "prior_text_encoder", [""])
            uncond = (negative.to(text).expand(len(text), -1, -1),)
        public = partial(features_from_latents, params=prior.params)
        draw = seeded_noise(seed, len(text))
        shape = (len(text), prior.params.c_in, prior_side(sampling.height), prior_side(sampling.width))
        x = sample(
            guided(in_fp32(prior), cond, uncond, scale),
            draw(torch.empty(shape, device=self.device)),
            sampling.prior_times(),
            draw=draw,
            callback=sampler_progress(callback, "prior", public),
        )
        return public(x)

    @torch.inference_mode()
    def sample_decoder(
        self,
        features: Tensor,
        text: Tensor,
        sampling: Sampling,
        *,
        negative: Tensor | None = None,
        seed: int = 0,
        callback: Callback | None = None,
    ) -> Tensor:
        """Stage B: features [B, 16, h, w] and text states [B, 77 n, c] to Stage A latents [B, 4, H/4, W/4].

        Guided, if it is, away from `negative` (default: "") without features. Latents are in codebook units.
        """
        decoder, scale_factor = need(self.decoder, "decoder"), need(self.vqgan, "vqgan").params.scale_factor
        text, features = text.to(weight_of(decoder)), features.to(self.device)  # features are resized in fp32
        scale, cond, uncond = max(sampling.decoder_guidance, 1.0), (features, text), (features, text)
        if scale > 1:
            if negative is None:
                negative = self.states(self.decoder_text_encoder, "decoder_text_encoder", [""])
            uncond = (torch.zeros_like(features), negative.to(text).expand(len(text), -1, -1))
        draw = seeded_noise(seed, len(text))
        shape = (len(text), decoder.params.c_in, decoder_side(sampling.height), decoder_side(sampling.width))
        x = sample(
            guided(in_fp32(decoder), cond, uncond, scale),
            draw(torch.empty(shape, device=self.device)),
            sampling.decoder_times(),
            draw=draw,
            callback=sampler_progress(callback, "decoder", lambda latents: latents * scale_factor),
        )
        return x * scale_factor

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> list[Image.Image]:
        """Stage A: latents [B, 4, h, w] in codebook units to pictures, one at a time to save memory."""
        vqgan = need(self.vqgan, "vqgan")
        latents = latents.to(weight_of(vqgan))
        return [picture for one in latents.split(1) for picture in to_pictures(vqgan.decode(one))]

    def features(self, pixels: Tensor) -> Tensor:
        encoder = need(self.image_encoder, "image_encoder")
        return encoder(semantic_view(pixels.to(weight_of(encoder)))).float()

    def states(self, encoder: TextEncoder | None, name: str, prompts: Sequence[str]) -> Tensor:
        return need(encoder, name).encode(prompts)


def weight_of(network: nn.Module) -> Tensor:
    return next(network.parameters())


def need(network: T | None, name: str) -> T:
    if network is None:
        raise ValueError(
            f"this model has no {name.replace('_', ' ')}, which is needed here: "
            "take a complete bundle or folder, or load the parts from several files"
        )
    return network


def in_fp32(network: nn.Module) -> Callable[..., Tensor]:
    """The network in its own precision, between samplers that work in fp32."""
    dtype = weight_of(network).dtype

    def model(x: Tensor, t: Tensor, *cond: Tensor) -> Tensor:
        return network(x.to(dtype), t, *cond).float()

    return model
