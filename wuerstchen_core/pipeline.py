"""Text, pictures and latents in, pictures out: the three stages of v2 behind one class."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from os import PathLike
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor, nn

from .checkpoints import PARTS, Part, build_part, read_metadata, read_part
from .checkpoints.parts import check_towers
from .checkpoints.read import open_source
from .demo.vocabulary import vocabulary_note
from .devices import pick_device, pick_dtype
from .diffusion.samplers import guided, sample, seeded_noise
from .diffusion.sizes import decoder_side, prior_side
from .models.decoder import Decoder
from .models.image_encoder import ImageEncoder, semantic_view
from .models.prior import Prior, features_from_latents
from .models.text_encoder import TextEncoder
from .models.vqgan import VQGAN
from .pictures import read_pixels, to_pictures
from .sampling import Callback, Sampling, check_count, ignore, sampler_progress

logger = logging.getLogger(__name__)

Source = str | PathLike[str]
T = TypeVar("T")

PAINTING_PARTS = tuple(name for name in PARTS if name != "image_encoder")
# 8 bits of mantissa do not give 8 bits of colour, and these two networks are small: they always run in fp32.
FP32_PARTS = ("vqgan", "image_encoder")


class WuerstchenPipeline:
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
        self._noted: set[str] = set()  # what the log was told already

    @classmethod
    def load(
        cls,
        source: Source | Mapping[str, Source] = "demo",
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
    ) -> WuerstchenPipeline:
        """The shipped model ("demo"), a bundle file, a diffusers folder, or sources by part: {"prior": FILE, ...}.

        A source that holds some parts only gives a pipeline with these. Raises ValueError where one can't be read.
        """
        target = pick_device(device)
        parts, metadata = _read(source)
        check_towers(parts)
        chosen = pick_dtype(dtype, target, sum(x.numel() for part in parts.values() for x in part.state_dict.values()))
        networks: dict[str, Any] = {}
        for name, part in parts.items():
            twin = next((other for other in networks if parts[other].state_dict is part.state_dict), None)
            wanted = torch.float32 if name in FP32_PARTS else chosen
            # A twin is the one text tower that serves both stages.
            networks[name] = networks[twin] if twin else build_part(part, device=target, dtype=wanted)
        return cls(**networks, metadata=metadata)

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        networks = (getattr(self, name) for name in PARTS)
        return _weight(_need(next((x for x in networks if x is not None), None), "network")).device

    @torch.inference_mode()
    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        negative: str = "",
        width: int | None = None,
        height: int | None = None,
        seed: int = 0,
        count: int = 1,
        schedule: str | None = None,
        prior_steps: int | None = None,
        prior_guidance: float | None = None,
        decoder_steps: int | None = None,
        decoder_guidance: float | None = None,
        callback: Callback | None = None,
    ) -> list[Image.Image]:
        """Paint `count` pictures of each prompt, prompt by prompt; picture i of them all has the seed `seed` + i.

        None stands for the model's own default. Raises ValueError, before any work, where a value cannot be used.
        Of a text above 75 tokens (about 50 words) each 75 are encoded for themselves; both stages read all of them.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        sampling = self.sampling.changed(
            width=width,
            height=height,
            schedule=schedule,
            prior_steps=prior_steps,
            prior_guidance=prior_guidance,
            decoder_steps=decoder_steps,
            decoder_guidance=decoder_guidance,
        )
        check_count(len(prompts) * count, seed)
        for name in PAINTING_PARTS:
            _need(getattr(self, name), name)
        note = vocabulary_note([*prompts, negative], self.metadata)
        if note and note not in self._noted:
            logger.warning(note)
            self._noted.add(note)
        report = callback or ignore
        wanted = [self.encode_text([text]) for text in prompts]
        unwanted = self.encode_text([negative])
        report("text", 1, 1, None)
        images: list[Image.Image] = []
        for _, alike in groupby(wanted, lambda states: states[0].shape):  # only texts of one length share a batch
            texts = [torch.cat(states).repeat_interleave(count, dim=0) for states in zip(*alike, strict=True)]
            told: dict[str, Any] = {"seed": seed + len(images), "callback": report}
            features = self.sample_prior(texts[0], sampling, negative=unwanted[0], **told)
            images += self.decode(self.sample_decoder(features, texts[1], sampling, negative=unwanted[1], **told))
        report("picture", 1, 1, None)
        return images

    @torch.inference_mode()
    def encode(self, image: Source | Image.Image, *, width: int | None = None, height: int | None = None) -> Tensor:
        """A picture to Stage C features [1, 16, h, w].

        The picture is scaled until it covers width x height and cropped around its centre. Without a size, the legal
        one nearest to the picture's own is taken; a picture with a side above 2048 pixels is first scaled down to it.
        """
        return self._features(read_pixels(image, width, height))

    @torch.inference_mode()
    def reconstruct(
        self,
        image: Source | Image.Image,
        *,
        prompt: str = "",
        seed: int = 0,
        width: int | None = None,
        height: int | None = None,
        decoder_steps: int | None = None,
        decoder_guidance: float | None = None,
        callback: Callback | None = None,
    ) -> list[Image.Image]:
        """A picture through the 42.67x bottleneck and back, as Stage B remembers it; size as in `encode`."""
        pixels = read_pixels(image, width, height)
        sampling = self.sampling.changed(
            width=pixels.shape[-1],
            height=pixels.shape[-2],
            decoder_steps=decoder_steps,
            decoder_guidance=decoder_guidance,
        )
        check_count(1, seed)
        text = self._states(self.decoder_text_encoder, "decoder_text_encoder", [prompt])
        latents = self.sample_decoder(self._features(pixels), text, sampling, seed=seed, callback=callback)
        return self.decode(latents)

    @torch.inference_mode()
    def encode_text(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Prompts of one n to text states [B, 77 n, c]: what the prior reads, and what the decoder reads."""
        prior = self._states(self.prior_text_encoder, "prior_text_encoder", prompts)
        if self.prior_text_encoder is self.decoder_text_encoder:
            return prior, prior
        return prior, self._states(self.decoder_text_encoder, "decoder_text_encoder", prompts)

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
        prior = _need(self.prior, "prior")
        text = text.to(_weight(prior))
        scale, cond, uncond = max(sampling.prior_guidance, 1.0), (text,), (text,)
        if scale > 1:
            if negative is None:
                negative = self._states(self.prior_text_encoder, "prior_text_encoder", [""])
            uncond = (negative.to(text).expand(len(text), -1, -1),)
        draw = seeded_noise(seed, len(text))
        shape = (len(text), prior.params.c_in, prior_side(sampling.height), prior_side(sampling.width))
        x = sample(
            guided(_in_fp32(prior), cond, uncond, scale),
            draw(torch.empty(shape, device=self.device)),
            sampling.prior_times(),
            draw=draw,
            callback=sampler_progress(callback, "prior", features_from_latents),
        )
        return features_from_latents(x)

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
        decoder, scale_factor = _need(self.decoder, "decoder"), _need(self.vqgan, "vqgan").params.scale_factor
        text, features = text.to(_weight(decoder)), features.to(self.device)  # features are resized in fp32
        scale, cond, uncond = max(sampling.decoder_guidance, 1.0), (features, text), (features, text)
        if scale > 1:
            if negative is None:
                negative = self._states(self.decoder_text_encoder, "decoder_text_encoder", [""])
            uncond = (torch.zeros_like(features), negative.to(text).expand(len(text), -1, -1))
        draw = seeded_noise(seed, len(text))
        shape = (len(text), decoder.params.c_in, decoder_side(sampling.height), decoder_side(sampling.width))
        x = sample(
            guided(_in_fp32(decoder), cond, uncond, scale),
            draw(torch.empty(shape, device=self.device)),
            sampling.decoder_times(),
            draw=draw,
            callback=sampler_progress(callback, "decoder", lambda latents: latents * scale_factor),
        )
        return x * scale_factor

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> list[Image.Image]:
        """Stage A: latents [B, 4, h, w] in codebook units to pictures, one at a time to save memory."""
        vqgan = _need(self.vqgan, "vqgan")
        latents = latents.to(_weight(vqgan))
        return [picture for one in latents.split(1) for picture in to_pictures(vqgan.decode(one))]

    def _features(self, pixels: Tensor) -> Tensor:
        encoder = _need(self.image_encoder, "image_encoder")
        return encoder(semantic_view(pixels.to(_weight(encoder)))).float()

    def _states(self, encoder: TextEncoder | None, name: str, prompts: Sequence[str]) -> Tensor:
        return _need(encoder, name).encode(prompts)


def _read(source: Source | Mapping[str, Source]) -> tuple[dict[str, Part], dict[str, Any]]:
    """The parts of a source, or of one source a part, and the metadata that says how the model is used."""
    if not isinstance(source, Mapping):
        opened = open_source(source)
        return {name: opened.part(name) for name in opened.networks}, opened.metadata
    if not source:
        raise ValueError(f"no file was given: name at least one of {', '.join(PARTS)}")
    main = source.get("prior", next(iter(source.values())))
    return {name: read_part(where, name) for name, where in source.items()}, read_metadata(main)


def _weight(network: nn.Module) -> Tensor:
    return next(network.parameters())


def _need(network: T | None, name: str) -> T:
    if network is None:
        raise ValueError(
            f"this model has no {name.replace('_', ' ')}, which is needed here: "
            "take a complete bundle or folder, or load the parts from several files"
        )
    return network


def _in_fp32(network: nn.Module) -> Callable[..., Tensor]:
    """The network in its own precision, between samplers that work in fp32."""
    dtype = _weight(network).dtype

    def model(x: Tensor, t: Tensor, *cond: Tensor) -> Tensor:
        return network(x.to(dtype), t, *cond).float()

    return model
