"""diffusers' implementation of Würstchen, run by its own two pipelines."""

from __future__ import annotations

import importlib
import json
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from wuerstchen_core.checkpoints.diffusers_layout import CLASSES, config_text
from wuerstchen_core.checkpoints.key_maps import vqgan_key_to_diffusers
from wuerstchen_core.diffusion.schedule import decoder_times, linear_times

from .cases import PRIOR_GUIDANCE, SEED, Case
from .measure import Callback, Side
from .weights import ModelSizes

PACKAGE = "diffusers.pipelines.deprecated.wuerstchen"
DRAW_NOISE = (
    f"{PACKAGE}.pipeline_wuerstchen",
    f"{PACKAGE}.pipeline_wuerstchen_prior",
    "diffusers.schedulers.scheduling_ddpm_wuerstchen",
)


def import_packages() -> None:
    """Imports diffusers, so that measurements leave its import out, and silences its warnings."""
    importlib.import_module("diffusers.utils.logging").set_verbosity_error()
    for part in CLASSES:
        network_class(part)
    for name in DRAW_NOISE:  # torch draws other numbers in bf16 than in fp32, and the outputs are compared with ours
        vars(importlib.import_module(name))["randn_tensor"] = _randn_tensor


def network_class(part: str) -> Any:
    """Returns diffusers' class of a network."""
    return getattr(importlib.import_module(PACKAGE), CLASSES[part])


def build_network(part: str, sizes: ModelSizes, state: dict[str, Tensor], **options: Any) -> Any:
    """Returns diffusers' network with these tensors as its weights; `options` change its configuration."""
    with torch.device("meta"):
        network = network_class(part).from_config(json.loads(config_text(part, sizes.of(part))) | options)
    network.load_state_dict({vqgan_key_to_diffusers(key): x for key, x in state.items()}, assign=True)
    return network


class DiffusersBaseline(Side):
    def load(self, part: str, state: dict[str, Tensor]) -> Any:
        return build_network(part, self.setting.sizes, state).eval().requires_grad_(False)

    def compile(self) -> None:
        for part, network in self.networks.items():
            if part == "vqgan":
                for name in ("encode", "decode"):
                    setattr(network, name, torch.compile(getattr(network, name)))
            else:
                network.compile()

    def vqgan(self, stage: str, data: Tensor) -> Tensor:
        network = self.networks["vqgan"]
        result: Tensor = network.encode(data).latents if stage == "vqgan-encode" else network.decode(data).sample
        return result

    def sample(self, case: Case, data: dict[str, Tensor], steps: int, callback: Callback) -> Tensor:
        if case.benchmark.parts[0] != "prior":
            return self._decoder(case, data, steps, callback, "latent")
        text, negative = data["prior_text"], data["prior_negative"].expand(case.batch, -1, -1)
        pipeline = self._pipeline("WuerstchenPriorPipeline", (text, negative), "prior")
        features: Tensor = pipeline(
            prompt_embeds=text,
            negative_prompt_embeds=negative,
            width=case.size,
            height=case.size,
            guidance_scale=PRIOR_GUIDANCE,
            **_sampling(case, linear_times(steps), callback),
        ).image_embeddings
        return features

    def images(self, case: Case, data: dict[str, Tensor], steps: int) -> list[Image.Image]:
        images: list[Image.Image] = self._decoder(case, data, steps, lambda: None, "pil")
        return images

    def _decoder(self, case: Case, data: dict[str, Tensor], steps: int, callback: Callback, output: str) -> Any:
        pipeline = self._pipeline("WuerstchenDecoderPipeline", (data["text"], None), "decoder", "vqgan")
        prompts = [""] * case.batch
        sampling = _sampling(case, decoder_times(steps), callback)
        return pipeline(data["features"], prompts, output_type=output, **sampling).images

    def _pipeline(self, name: str, text: tuple[Tensor, Tensor | None], *parts: str) -> Any:
        """Returns a pipeline of the loaded networks that takes text states instead of text."""
        scheduler = importlib.import_module("diffusers").DDPMWuerstchenScheduler()
        networks = {part: self.networks[part] for part in parts}
        kind = getattr(importlib.import_module(PACKAGE), name)
        pipeline = kind(scheduler=scheduler, tokenizer=None, text_encoder=None, **networks)
        pipeline.set_progress_bar_config(disable=True)
        pipeline.encode_prompt = lambda *_, **__: text
        return pipeline


def _sampling(case: Case, times: Tensor, callback: Callback) -> dict[str, Any]:
    def end_of_step(*_: Any) -> dict[str, Any]:
        callback()
        return {}

    generators = [torch.Generator().manual_seed(SEED + i) for i in range(case.batch)]
    return {"timesteps": times, "generator": generators, "callback_on_step_end": end_of_step}


def _randn_tensor(shape: tuple[int, ...], generator: Any = None, device: Any = None, dtype: Any = None) -> Tensor:
    """Draws fp32 noise from one generator per picture, as ours does."""
    return torch.stack([torch.randn(shape[1:], generator=one) for one in generator]).to(device, dtype)
