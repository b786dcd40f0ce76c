"""The pipeline: text, pictures and latents in, pictures out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from os import PathLike
from typing import Any

import torch
from PIL import Image

from ..checkpoints import PARTS, Part, build_part
from ..checkpoints.lora_files import Loras, merge_loras
from ..checkpoints.open import open_source
from ..checkpoints.release import check_parts
from ..common.devices import pick_device, pick_dtype
from ..diffusion.samplers import Seed
from . import editing, prompts, stages
from .compile import can_compile, compile_network
from .prompts import Prompt
from .settings import Callback, notify

Source = str | PathLike[str]

_DECODERS = {"token_decoder": "v1", "decoder": "v2"}


class WuerstchenPipeline(stages.Components):
    """Generates and edits pictures with one model. Its methods are the functions of this package, by name."""

    # One stage at a time.
    encode_text = stages.encode_text
    encode_prompt = prompts.encode_prompt
    warn_of_unknown_words = prompts.warn_of_unknown_words
    encode = editing.encode
    sample_prior = stages.sample_prior
    sample_decoder = stages.sample_decoder
    decode = stages.decode
    # Pictures in, pictures out.
    reconstruct = editing.reconstruct
    variations = editing.variations
    inpaint = editing.inpaint
    outpaint = editing.outpaint
    interpolate = editing.interpolate

    @classmethod
    def load(
        cls,
        source: Source | Mapping[str, Source] = "demo",
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        version: str = "auto",
        compile: bool = False,
        lora: Source | Loras | None = None,
    ) -> WuerstchenPipeline:
        """Loads the shipped model ("demo"), a bundle, a folder (of diffusers, `convert` or our trainers), or components
        from separate sources: {"prior": FILE, ...}, where the metadata is the prior's, or else the first source's.

        `version` ("v1" or "v2") is the release of a prior 1024 wide that nothing else identifies. `compile` calls the
        method of that name. `lora` is a LoRA file for the prior (and its text encoder), or strengths by file. A source
        with some components gives a pipeline with these. Raises ValueError if a source cannot be read.
        """
        target = pick_device(device)
        parts, metadata = _read(source, version)
        check_parts(parts)
        chosen = pick_dtype(dtype, target, sum(x.numel() for part in parts.values() for x in part.state_dict.values()))
        networks: dict[str, Any] = {}
        for name, part in parts.items():
            # One text encoder can serve both stages.
            twin = next((other for other in networks if parts[other].state_dict is part.state_dict), None)
            # A picture is encoded once and steers all that follows; bf16 costs Stage A half a level of 255.
            precision = torch.float32 if name == "image_encoder" else chosen
            networks[name] = networks[twin] if twin else build_part(part, device=target, dtype=precision)
        if lora is not None:
            merge_loras(networks, lora if isinstance(lora, Mapping) else {lora: 1.0})
        pipeline = cls(**networks, metadata=metadata)
        pipeline.source = None if isinstance(source, Mapping) else str(source)
        if compile:
            pipeline.compile()
        return pipeline

    def compile(self, **options: Any) -> None:
        """Compiles Stages C and B with `torch.compile` at their first steps, which take longer; see `compile_network`.

        `options` are `torch.compile`'s; raises ValueError for unknown ones. If torch cannot compile here, it logs why
        and changes nothing. Meant for GPUs: on a CPU it is slower.
        """
        if can_compile(self.device, **options):
            for name in stages.DENOISERS:
                if (network := getattr(self, name)) is not None:
                    compile_network(network, **options)

    @torch.inference_mode()
    def generate(
        self,
        prompt: Prompt | Sequence[Prompt],
        *,
        negative: str = "",
        width: int | None = None,
        height: int | None = None,
        seed: Seed = 0,
        count: int = 1,
        schedule: str | None = None,
        prior_steps: int | None = None,
        prior_guidance: float | None = None,
        decoder_steps: int | None = None,
        decoder_guidance: float | None = None,
        decoder_guidance_end: float | None = None,
        temperature: tuple[float, float] | None = None,
        token_mode: str | None = None,
        sampler: str | None = None,
        callback: Callback | None = None,
    ) -> list[Image.Image]:
        """Generates `count` pictures of each prompt, prompt by prompt; picture i has seed `seed` + i, or `seed[i]`.

        A prompt with weights, {"a cat": 2, "a dog": 1}, is a mix: the weighted average of the texts' states. None means
        the model's default. Raises ValueError, before any work, for values that cannot be used. Texts above 75 tokens
        (about 50 words) are encoded in pieces of 75; both stages read all of them.
        """
        several = [prompt] if isinstance(prompt, str | Mapping) else list(prompt)
        sampling = self.sampling.updated(
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
            sampler=sampler,
        )
        prompts.check_request(self, [*several, negative], len(several) * count, seed)
        cond = [self.encode_prompt(one) for one in several]
        uncond = self.encode_text([negative])
        notify(callback, "text")
        images: list[Image.Image] = []
        for _, batch in groupby(cond, lambda states: states[0].shape):  # only texts of one length share a batch
            texts = [torch.cat(states).repeat_interleave(count, dim=0) for states in zip(*batch, strict=True)]
            seeds = seed[len(images) :] if isinstance(seed, Sequence) else seed + len(images)
            run: dict[str, Any] = {"seed": seeds, "callback": callback}
            features = self.sample_prior(texts[0], sampling, negative=uncond[0], **run)
            images += self.decode(self.sample_decoder(features, texts[1], sampling, negative=uncond[1], **run))
        notify(callback, "picture")
        return images


def _read(source: Source | Mapping[str, Source], version: str) -> tuple[dict[str, Part], dict[str, Any]]:
    """Returns the parts of a source, or of one source per part, and the model's metadata."""
    if not isinstance(source, Mapping):
        opened = open_source(source, version=version)
        names = (name for name in opened.networks if hasattr(stages.Components, name))
        return {name: opened.part(name) for name in names}, opened.metadata
    if not source:
        raise ValueError(f"no file was given: name at least one of {', '.join(PARTS)}")
    main = "prior" if "prior" in source else next(iter(source))
    if version == "auto":  # the Stage B beside it tells the release of a prior
        version = next((release for name, release in _DECODERS.items() if name in source), version)
    sources = {name: open_source(where, name, version=version) for name, where in source.items()}
    return {name: opened.part(name) for name, opened in sources.items()}, sources[main].metadata
