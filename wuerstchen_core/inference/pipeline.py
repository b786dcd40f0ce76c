"""Text, pictures and latents in, pictures out: the three stages of v2 behind one class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from os import PathLike
from typing import Any

import torch
from PIL import Image

from ..checkpoints import PARTS, Part, build_part
from ..checkpoints.components import check_towers
from ..checkpoints.lora_files import Loras, merge_loras
from ..checkpoints.open import open_source
from ..checkpoints.release import check_release
from ..common.devices import pick_device, pick_dtype
from ..diffusion.samplers import Seed
from .editing import Editing
from .prompts import Prompt
from .settings import Callback, ignore

Source = str | PathLike[str]


_DECODERS = {"token_decoder": "v1", "decoder": "v2"}


class WuerstchenPipeline(Editing):
    """Text, pictures and latents in, pictures out."""

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
        """The shipped model ("demo"), a bundle, a folder (of diffusers, `convert` or our trainers), or sources by part:
        {"prior": FILE, ...}, of which the prior's, or else the first, says how the model is used.

        `version` ("v1" or "v2") decides about a prior 1024 wide that nothing else tells apart. `compile` calls
        the method of that name. `lora` is a LoRA file for the prior (and its text tower), or strengths by file.
        A source that holds some parts only gives a pipeline with these. Raises ValueError where one can't be read.
        """
        target = pick_device(device)
        parts, metadata = _read(source, version)
        check_towers(parts)
        check_release({name: part.params for name, part in parts.items()})
        chosen = pick_dtype(dtype, target, sum(x.numel() for part in parts.values() for x in part.state_dict.values()))
        networks: dict[str, Any] = {}
        for name, part in parts.items():
            twin = next((other for other in networks if parts[other].state_dict is part.state_dict), None)
            # A picture is read once and steers all that follows; what bf16 costs Stage A is half a level of 255.
            wanted = torch.float32 if name == "image_encoder" else chosen
            # A twin is the one text tower that serves both stages.
            networks[name] = networks[twin] if twin else build_part(part, device=target, dtype=wanted)
        if lora is not None:
            merge_loras(networks, lora if isinstance(lora, Mapping) else {lora: 1.0})
        pipeline = cls(**networks, metadata=metadata)
        pipeline.source = None if isinstance(source, Mapping) else str(source)
        if compile:
            pipeline.compile()
        return pipeline

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
        """Paint `count` pictures of each prompt, prompt by prompt; picture i of them all has the seed `seed` + i, or
        `seed[i]`.

        A prompt with weights, {"a cat": 2, "a dog": 1}, is a mix: the weighted average of what the texts say.
        None stands for the model's own default. Raises ValueError, before any work, where a value cannot be used.
        Of a text above 75 tokens (about 50 words) each 75 are encoded for themselves; both stages read all of them.
        """
        prompts = [prompt] if isinstance(prompt, str | Mapping) else list(prompt)
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
            sampler=sampler,
        )
        self.check([*prompts, negative], len(prompts) * count, seed)
        report = callback or ignore
        wanted = [self.encode_prompt(one) for one in prompts]
        unwanted = self.encode_text([negative])
        report("text", 1, 1, None)
        images: list[Image.Image] = []
        for _, alike in groupby(wanted, lambda states: states[0].shape):  # only texts of one length share a batch
            texts = [torch.cat(states).repeat_interleave(count, dim=0) for states in zip(*alike, strict=True)]
            seeds = seed[len(images) :] if isinstance(seed, Sequence) else seed + len(images)
            told: dict[str, Any] = {"seed": seeds, "callback": report}
            features = self.sample_prior(texts[0], sampling, negative=unwanted[0], **told)
            images += self.decode(self.sample_decoder(features, texts[1], sampling, negative=unwanted[1], **told))
        report("picture", 1, 1, None)
        return images


def _read(source: Source | Mapping[str, Source], version: str) -> tuple[dict[str, Part], dict[str, Any]]:
    """The parts of a source, or of one source a part, and the metadata that says how the model is used."""
    if not isinstance(source, Mapping):
        opened = open_source(source, version=version)
        return {name: opened.part(name) for name in opened.networks}, opened.metadata
    if not source:
        raise ValueError(f"no file was given: name at least one of {', '.join(PARTS)}")
    main = "prior" if "prior" in source else next(iter(source))
    if version == "auto":  # the Stage B beside it tells whose a prior is
        version = next((told for name, told in _DECODERS.items() if name in source), version)
    sources = {name: open_source(where, name, version=version) for name, where in source.items()}
    return {name: opened.part(name) for name, opened in sources.items()}, sources[main].metadata
