"""A model's networks, and its stages one by one: tensors in, tensors out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor, nn

from ..checkpoints import PARTS
from ..checkpoints.release import release_of_model
from ..common.geometry import decoder_side, prior_side
from ..diffusion.samplers import Seed, guidance, guided, sample, seeded_noise
from ..diffusion.schedule import diffuse, strength_times
from ..diffusion.token_sampler import SeededTokenNoise, sample_tokens
from ..models.decoder import Decoder
from ..models.image_encoder import ImageEncoder, semantic_view
from ..models.prior import KVCache, Prior, features_from_latents, latents_from_features
from ..models.text_encoder import TextEncoder
from ..models.token_decoder import TokenDecoder
from ..models.vqgan import VQGAN
from .compile import can_compile, compile_network
from .images import to_pictures
from .settings import Callback, SamplingSettings, sampler_progress

T = TypeVar("T")

DENOISERS = ("prior", "decoder", "token_decoder")


class Stages:
    """The networks of one model. Any may be None: what needs it says so, the rest works."""

    def __init__(
        self,
        *,
        prior: Prior | None = None,
        decoder: Decoder | None = None,
        token_decoder: TokenDecoder | None = None,
        vqgan: VQGAN | None = None,
        image_encoder: ImageEncoder | None = None,
        prior_text_encoder: TextEncoder | None = None,
        decoder_text_encoder: TextEncoder | None = None,
        metadata: Mapping[str, Any] | None = None,
    ):
        self.prior = prior
        self.decoder = decoder
        self.token_decoder = token_decoder
        self.vqgan = vqgan
        self.image_encoder = image_encoder
        self.prior_text_encoder = prior_text_encoder
        self.decoder_text_encoder = decoder_text_encoder
        self.metadata = dict(metadata or {})
        self.version = release_of_model([network.params for network in self.networks()])
        self.sampling = SamplingSettings.of(self.metadata, self.version)

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return weight_of(need(next(self.networks(), None), "network")).device

    def networks(self) -> Iterator[Any]:
        """The networks that there are."""
        return (network for name in PARTS if (network := getattr(self, name)) is not None)

    def compile(self, **options: Any) -> None:
        """Let torch compile Stages C and B at their first steps, which take longer; `options` are `torch.compile`'s.

        Where it can't, it says so in the log, and they stay as they are. It is meant for GPUs: a CPU is slower with it.
        ValueError where torch doesn't know the options. What compiled networks do otherwise: `compile_network`.
        """
        if not can_compile(self.device, **options):
            return
        for name in DENOISERS:
            if getattr(self, name) is not None:
                compile_network(getattr(self, name), **options)

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
        sampling: SamplingSettings,
        *,
        negative: Tensor | None = None,
        seed: Seed = 0,
        callback: Callback | None = None,
        init: Tensor | None = None,
        mask: Tensor | None = None,
        strength: float = 1.0,
    ) -> Tensor:
        """Stage C: text states [B, 77 n, c] to features [B, 16, h, w]; guided away from `negative` (default: "").

        With the features `init` of a picture it starts from these, noised up to `strength` (0: they come back as they
        are, 1: from noise alone), and keeps them where `mask` [B, 1, h, w] is 0.
        """
        prior = need(self.prior, "prior")
        times = strength_times(sampling.prior_times(), strength)
        if init is not None and strength == 0:
            return init
        text = text.to(weight_of(prior))
        scale, cond, uncond = max(sampling.prior_guidance, 1.0), (text,), (text,)
        if scale > 1:
            if negative is None:
                negative = self.states(self.prior_text_encoder, "prior_text_encoder", [""])
            uncond = (negative.to(text).expand(len(text), -1, -1),)
        public = partial(features_from_latents, params=prior.params)
        draw = seeded_noise(seed, len(text))
        shape = (len(text), prior.params.c_in, prior_side(sampling.height), prior_side(sampling.width))
        x = noise = draw(torch.empty(shape, device=self.device))
        init, mask = (None if y is None else y.to(self.device) for y in (init, mask))
        clean = None if init is None else latents_from_features(init, prior.params)
        if clean is not None and strength < 1:  # at 1 a hundredth of the picture would be left
            x = diffuse(clean, times[:1].to(x.device).expand(len(x)), noise)
        x = sample(
            guided(in_fp32(prior, KVCache(prior)), cond, uncond, scale),
            x,
            times,
            draw=draw,
            sampler=sampling.sampler,
            init=None if mask is None else clean,
            mask=mask,
            kept_noise=noise,
            callback=sampler_progress(callback, "prior", public),
        )
        return public(x) if init is None or mask is None else torch.where(mask > 0, public(x), init)

    @torch.inference_mode()
    def sample_decoder(
        self,
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
        """Stage B: features [B, 16, h, w] and text states [B, 77 n, c] to Stage A latents [B, 4, H/4, W/4].

        Guided, if it is, away from `negative` (default: "") without features. Latents are in codebook units. With
        latents `init` and a `mask` [B, 1, H/4, W/4], those stay where the mask is 0.
        """
        vqgan = need(self.vqgan, "vqgan")
        decoder: Decoder | TokenDecoder
        decoder = need(self.decoder, "decoder") if self.token_decoder is None else self.token_decoder
        text, features = text.to(weight_of(decoder)), features.to(self.device)  # features are resized in fp32
        cond, uncond = (features, text), (features, text)
        if max(sampling.decoder_scales()) > 1:
            if negative is None:
                negative = self.states(self.decoder_text_encoder, "decoder_text_encoder", [""])
            uncond = (torch.zeros_like(features), negative.to(text).expand(len(text), -1, -1))
        predict = guidance(in_fp32(decoder), cond, uncond)
        height, width = decoder_side(sampling.height), decoder_side(sampling.width)
        if isinstance(decoder, TokenDecoder):
            return _paint_tokens(predict, vqgan, (len(text), height, width), sampling, seed, callback, init, mask)
        scale_factor = vqgan.params.scale_factor
        draw = seeded_noise(seed, len(text))
        shape = (len(text), decoder.params.c_in, height, width)
        scales = iter(sampling.decoder_scales())
        noise = draw(torch.empty(shape, device=self.device))
        x = sample(
            lambda x, t: predict(x, t, next(scales)),
            noise,
            sampling.decoder_times(),
            draw=draw,
            init=None if init is None else init / scale_factor,
            mask=mask,
            kept_noise=noise,
            callback=sampler_progress(callback, "decoder", lambda latents: latents * scale_factor),
        )
        return x * scale_factor if init is None or mask is None else torch.where(mask > 0, x * scale_factor, init)

    @torch.inference_mode()
    def paint(self, features: Tensor, text: Tensor, sampling: SamplingSettings, **told: Any) -> list[Image.Image]:
        """Stages B and A: features and text states to pictures; what else can be told is `sample_decoder`'s."""
        return self.decode(self.sample_decoder(features, text, sampling, **told))

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


def in_fp32(network: nn.Module, read: Callable[[Tensor], Any] = lambda text: text) -> Callable[..., Tensor]:
    """The network in its own precision, between samplers that work in fp32; it is given `read` of its last argument."""
    dtype = weight_of(network).dtype

    def model(x: Tensor, t: Tensor, *cond: Tensor) -> Tensor:
        *others, text = cond
        return network(x.to(dtype) if x.is_floating_point() else x, t, *others, read(text)).float()

    return model


def _paint_tokens(
    predict: Callable[[Tensor, Tensor, float], Tensor],
    vqgan: VQGAN,
    shape: tuple[int, int, int],
    sampling: SamplingSettings,
    seed: Seed,
    callback: Callback | None,
    init: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    """Tokens [B, H, W] by v1's Stage B, as Stage A latents [B, 4, H, W] in codebook units, as `init` is."""
    codebook = vqgan.vquantizer.codebook.weight
    draw = SeededTokenNoise(seed, shape[0])
    noise = draw.tokens(len(codebook), *shape[1:]).to(codebook.device)
    tokens = sample_tokens(
        predict,
        noise,
        sampling.decoder_times(),
        noise=noise,
        draw=draw,
        codebook=codebook,
        scales=sampling.decoder_scales(),
        temperatures=sampling.temperatures(),
        mode=sampling.token_mode,
        init=None if init is None else vqgan.quantize(init).indices,
        mask=None if mask is None else (mask > 0).squeeze(1).expand_as(noise),
        callback=sampler_progress(callback, "decoder", vqgan.indices_to_latents),
    )
    return vqgan.indices_to_latents(tokens)
