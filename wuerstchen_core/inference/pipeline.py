"""WuerstchenPipeline: loads a model, generates pictures from text, and edits pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from inspect import signature
from itertools import groupby
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from ..checkpoints.lora_merge import Loras
from ..checkpoints.release import check_parts, release_of_model
from ..common.devices import pick_device, pick_dtype
from ..common.numbers import to_int
from ..common.values import to_list
from ..diffusion.samplers import Seed
from . import editing, embeddings, loras, prompts, stages
from .arguments import check_keywords
from .compile import can_compile, compile_network
from .components import Components
from .control import AnyHint, LoadedHints, load_hints
from .editing import EditOptions
from .embeddings import Embeddings
from .low_memory import StoredNetworks
from .methods import image_method
from .prompts import Prompt
from .settings import Callback, SamplingOptions, notify
from .sources import AnyPath, PartFiles, file_records, read_sources

if TYPE_CHECKING:
    from typing_extensions import Unpack


class WuerstchenPipeline(Components):
    """Generates and edits pictures with one model, and runs its stages one by one.

    Create it with `load`, or from networks: `WuerstchenPipeline(prior=..., decoder=..., ..., metadata=...)`. Methods
    take pictures as paths or PIL images, and return lists of PIL images. `settings` are the keyword arguments schedule,
    sampler, prior_steps, prior_guidance, decoder_steps, decoder_guidance, decoder_guidance_end, decoder_reuse and, for
    v1, temperature and token_mode (see `SamplingSettings`); the model's defaults apply to those that are absent or
    None. `callback(stage, done, steps, denoised)` is called after each step. `progress` draws a bar with tqdm, if that
    is installed: True, False, or None for interactive use only; the attribute `progress` is the default of all calls.
    Invalid arguments raise ValueError before any computation.
    """

    progress: bool | None = None

    # One stage at a time.
    encode_text = prompts.encode_text
    encode_prompt = prompts.encode_prompt
    warn_of_unknown_words = prompts.warn_of_unknown_words
    encode = editing.encode
    sample_prior = stages.sample_prior
    sample_decoder = stages.sample_decoder
    decode = stages.decode
    load_embeddings = embeddings.load_embeddings
    load_lora = loras.load_lora
    set_lora_strength = loras.set_lora_strength
    unload_lora = loras.unload_lora
    # Pictures in, pictures out.
    reconstruct = image_method(SamplingOptions)(editing.reconstruct)
    variations = image_method(EditOptions)(editing.variations)
    inpaint = image_method(EditOptions)(editing.inpaint)
    outpaint = image_method(EditOptions)(editing.outpaint)
    interpolate = image_method(SamplingOptions)(editing.interpolate)

    @classmethod
    def load(
        cls,
        source: AnyPath | Mapping[str, AnyPath] = "demo",
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        version: str = "auto",
        compile: bool = False,
        low_memory: bool = False,
        lora: AnyPath | Sequence[AnyPath] | Loras | None = None,
        progress: bool | None = None,
        **parts: Unpack[PartFiles],
    ) -> WuerstchenPipeline:
        """Loads a model from one source, or its components from several.

        A source is "demo" or "demo-v1" (the shipped models), a weight file, or a folder (of diffusers, `convert` or a
        training run). It need not be complete. `parts` replace components of the source: `prior=FILE`, `decoder=FILE`
        and so on; `text_encoder` stands for both text encoders. A mapping names one source per component:
        {"prior": FILE, ...}; the metadata is then the prior's, or without a prior the first source's.

        `device` "auto" is the GPU if there is one. `dtype` "auto" is fp32 for small models; for large ones it is int8
        on CPUs with AVX512-VNNI and without AMX (not for v1, nor with `compile`), else bf16 if it is native, else fp32.
        `version` ("v1" or "v2") is the release of a prior that could be of either. `lora` is a LoRA's file or folder, a
        list, or a mapping from these to strengths, for `load_lora`. `compile` calls the method of that name, `progress`
        sets the attribute. With `low_memory`, each network is read when it is used, and released before the next one:
        the files must stay as they are. Raises ValueError if a source cannot be read.
        """
        known = [name for name in signature(cls.load).parameters if name != "parts"]
        check_keywords("load", parts, [*known, *PartFiles.__annotations__])
        target = pick_device(device)
        loaded, metadata = read_sources(source, parts, version)
        check_parts(loaded)
        parameters = sum(part.parameters for part in loaded.values())
        # v1 got a few things wrong in int8 (docs/precision.md).
        allow_int8 = not compile and release_of_model(part.params for part in loaded.values()) != "v1"
        chosen = pick_dtype(dtype, target, parameters, allow_int8=allow_int8)
        stored = StoredNetworks(loaded, target, chosen)
        networks: dict[str, Any] = {}
        for name, part in loaded.items():
            # One text encoder can serve both stages.
            twin = next((other for other in networks if loaded[other].state_dict is part.state_dict), None)
            if twin is not None:
                networks[name] = networks[twin]
            else:
                networks[name] = stored.outline(name) if low_memory else stored.build(name)
        pipeline = cls(**networks, metadata=metadata)
        pipeline.stored = stored if low_memory else None
        if not isinstance(lora, Mapping):
            lora = dict.fromkeys(to_list("lora", () if lora is None else lora, str | PathLike), 1.0)
        for file, strength in lora.items():
            pipeline.load_lora(file, strength)
        pipeline.source = None if isinstance(source, Mapping) else str(source)
        pipeline.files = file_records(source, parts)
        pipeline.progress = progress
        if compile:
            pipeline.compile()
        return pipeline

    def compile(self, **options: Any) -> None:
        """Makes Stages C and B compile with `torch.compile` at their first steps; see `compile_network`.

        `options` are those of `torch.compile`; raises ValueError for unknown ones, and with `low_memory`. Where torch
        cannot compile, this logs the reason and changes nothing. Meant for GPUs: compiled networks are slower on a CPU.
        """
        if self.stored is not None:
            raise ValueError("with low_memory, networks would be compiled anew for each picture: leave out one of both")
        if can_compile(self.device, **options):
            for name in stages.DENOISERS:
                if (network := getattr(self, name)) is not None:
                    compile_network(network, **options)

    @image_method(SamplingOptions)
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
        embeddings: Embeddings | None = None,
        control: AnyHint | Sequence[AnyHint] | None = None,
        callback: Callback | None = None,
        **settings: Unpack[SamplingOptions],
    ) -> list[Image.Image]:
        """Generates `count` pictures of each prompt, in the order of the prompts.

        Picture i has seed `seed` + i, or `seed[i]`. A mapping such as {"a cat": 2, "a dog": 1} is one prompt, a mix:
        the weighted average of its texts' states. Texts above 75 tokens (about 50 words) are encoded in pieces of 75,
        and both stages read all pieces. `embeddings` (files, a folder, or files by name) are textual inversions for
        `embedding:NAME` in prompts, as in ComfyUI; see `load_embeddings`. `control` hints at the shapes and places of
        things: (net, picture, strength), where `net` is the file of a ControlNet, or a `Hint`, which has more options,
        or a list of these. Several add up.
        """
        if embeddings is not None:
            self.load_embeddings(embeddings)
        several = prompts.list_prompts(prompt)
        sampling = self.sampling.updated(width=width, height=height, **settings)
        count = to_int("count", count)
        seed = prompts.check_request(self, [*several, negative], len(several) * count, seed)
        hints = load_hints(self, control, sampling, len(several) * count)
        cond, uncond = prompts.encode_request(self, several, negative, sampling)
        notify(callback, "text")
        batches: list[tuple[list[Tensor], LoadedHints, dict[str, Any]]] = []
        done = 0
        for _, batch in groupby(cond, lambda states: states[0].shape):  # only texts of one length share a batch
            texts = [torch.cat(states).repeat_interleave(count, dim=0) for states in zip(*batch, strict=True)]
            seeds = seed[done:] if isinstance(seed, Sequence) else seed + done
            own_hints = hints.of_images(done, len(texts[0]))
            batches.append((texts, own_hints, {"seed": seeds, "callback": callback}))
            done += len(texts[0])
        with self.using("prior"):
            run_prior = partial(self.sample_prior, sampling=sampling, negative=uncond[0])
            features = [run_prior(x[0], control=own_hints, **run) for x, own_hints, run in batches]
        with self.using(self.stage_b):
            latents = [
                self.sample_decoder(y, x[1], sampling, negative=uncond[1], **run)
                for (x, _, run), y in zip(batches, features, strict=True)
            ]
        with self.using("vqgan"):
            images = [image for one in latents for image in self.decode(one)]
        notify(callback, "picture")
        return images

    __call__ = generate
