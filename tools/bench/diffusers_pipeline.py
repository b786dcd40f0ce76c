"""diffusers' two pipelines in a row, from text states to pictures."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from wuerstchen_core.diffusion.schedule import linear_times

from .cases import STEPS, Case
from .inputs import PRIOR_GUIDANCE, SEED
from .picture import Steps, pixels, steps_done
from .setting import Setting

PACKAGE = "diffusers.pipelines.deprecated.wuerstchen"
DRAWING = (
    f"{PACKAGE}.pipeline_wuerstchen",
    f"{PACKAGE}.pipeline_wuerstchen_prior",
    "diffusers.schedulers.scheduling_ddpm_wuerstchen",
)


class Painter:
    """The pipelines, with networks that are there already, and text states in the place of text."""

    def __init__(self, networks: dict[str, Any], scheduler: Callable[[], Any], setting: Setting):
        package = importlib.import_module(PACKAGE)
        for name in DRAWING:  # torch draws other bf16 numbers than fp32 ones, and the pictures are compared with ours
            vars(importlib.import_module(name))["randn_tensor"] = _randn
        none = {"tokenizer": None, "text_encoder": None}
        parts = {part: networks[part] for part in ("decoder", "vqgan")}
        self._setting = setting
        self._prior = package.WuerstchenPriorPipeline(prior=networks["prior"], scheduler=scheduler(), **none)
        self._decoder = package.WuerstchenDecoderPipeline(scheduler=scheduler(), **parts, **none)
        for pipeline in (self._prior, self._decoder):
            pipeline.set_progress_bar_config(disable=True)

    def paint(self, case: Case, given: dict[str, Tensor]) -> tuple[Tensor, float]:
        """Pixels [B, 3, H, W], and the seconds of the steps left out."""
        prior_steps, decoder_steps = steps_done(self._setting, STEPS)
        told: dict[str, Any] = {"generator": [torch.Generator().manual_seed(SEED + i) for i in range(case.batch)]}
        text, negative = given["prior_text"], given["prior_negative"].expand(case.batch, -1, -1)
        self._prior.encode_prompt = lambda *_, **__: (text, negative)
        self._decoder.encode_prompt = lambda *_, **__: (given["text"], None)
        steps = Steps(self._setting.clock)
        features = self._prior(
            prompt_embeds=text,
            negative_prompt_embeds=negative,
            width=case.side,
            height=case.side,
            timesteps=linear_times(prior_steps),
            guidance_scale=PRIOR_GUIDANCE,
            callback_on_step_end=_watch(steps, "prior"),
            **told,
        ).image_embeddings
        told["generator"] = [generator.manual_seed(SEED + i) for i, generator in enumerate(told["generator"])]
        steps.begin()
        pictures = self._decoder(
            features,
            prompt=[""] * case.batch,
            timesteps=linear_times(decoder_steps),
            callback_on_step_end=_watch(steps, "decoder"),
            **told,
        ).images
        return pixels(pictures), steps.left_out(STEPS)


def _watch(steps: Steps, stage: str) -> Callable[..., dict[str, Any]]:
    def end_of_step(*_: Any) -> dict[str, Any]:
        steps.done(stage)
        return {}

    return end_of_step


def _randn(shape: tuple[int, ...], generator: Any = None, device: Any = None, dtype: Any = None) -> Tensor:
    """Normal noise drawn in fp32, from a generator for each picture."""
    return torch.stack([torch.randn(shape[1:], generator=one) for one in generator]).to(device, dtype)
