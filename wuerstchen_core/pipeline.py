"""Text, pictures and latents in, pictures out: the three stages of v2 behind one class."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from itertools import groupby
from os import PathLike
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from .checkpoints import PARTS, PARTS_OF, Part, build_part, read_metadata, read_part
from .checkpoints.parts import check_towers
from .checkpoints.read import open_source
from .demo.vocabulary import vocabulary_note
from .devices import pick_device, pick_dtype
from .pictures import read_pixels
from .sampling import Callback, check_count, ignore
from .stages import Stages, need

logger = logging.getLogger(__name__)

Source = str | PathLike[str]


# 8 bits of mantissa do not give 8 bits of colour, and these two networks are small: they always run in fp32.
FP32_PARTS = ("vqgan", "image_encoder")


class WuerstchenPipeline(Stages):
    """Text, pictures and latents in, pictures out."""

    def __init__(self, **given: Any):
        super().__init__(**given)
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
        decoder_guidance_end: float | None = None,
        temperature: tuple[float, float] | None = None,
        token_mode: str | None = None,
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
            decoder_guidance_end=decoder_guidance_end,
            temperature=temperature,
            token_mode=token_mode,
        )
        check_count(len(prompts) * count, seed)
        for name in PARTS_OF[self.version]:
            if name != "image_encoder":
                need(getattr(self, name), name)
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
        return self.features(read_pixels(image, width, height))

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
        text = self.states(self.decoder_text_encoder, "decoder_text_encoder", [prompt])
        latents = self.sample_decoder(self.features(pixels), text, sampling, seed=seed, callback=callback)
        return self.decode(latents)


def _read(source: Source | Mapping[str, Source]) -> tuple[dict[str, Part], dict[str, Any]]:
    """The parts of a source, or of one source a part, and the metadata that says how the model is used."""
    if not isinstance(source, Mapping):
        opened = open_source(source)
        return {name: opened.part(name) for name in opened.networks}, opened.metadata
    if not source:
        raise ValueError(f"no file was given: name at least one of {', '.join(PARTS)}")
    main = source.get("prior", next(iter(source.values())))
    return {name: read_part(where, name) for name, where in source.items()}, read_metadata(main)
