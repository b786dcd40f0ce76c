"""This implementation, called as its users call it."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from torch import Tensor

from wuerstchen_core.checkpoints import Part, build_part
from wuerstchen_core.inference.pipeline import WuerstchenPipeline
from wuerstchen_core.inference.settings import SamplingSettings

from .cases import PRIOR_GUIDANCE, SEED, Case
from .measure import Callback, Setting, Side, States


class Wuerstchen(Side):
    def __init__(self, setting: Setting, states: States):
        super().__init__(setting, states)
        self.pipeline = WuerstchenPipeline(**self.networks)

    def load(self, part: str, state: dict[str, Tensor]) -> Any:
        setting = self.setting
        dtype = torch.int8 if setting.case.dtype == "int8" else setting.dtype
        return build_part(Part(part, setting.sizes.of(part), state), device=setting.device, dtype=dtype)

    def compile(self) -> None:
        self.pipeline.compile()

    def vqgan(self, stage: str, data: Tensor) -> Tensor:
        result: Tensor = getattr(self.networks["vqgan"], stage.removeprefix("vqgan-"))(data)
        return result

    def sample(self, case: Case, data: dict[str, Tensor], steps: int, callback: Callback) -> Tensor:
        settings = SamplingSettings(case.size, case.size, "linear", steps, PRIOR_GUIDANCE, steps)
        if case.benchmark.parts[0] == "prior":
            negative = data["prior_negative"]
            return self.pipeline.sample_prior(
                data["prior_text"], settings, negative=negative, seed=SEED, callback=callback
            )
        return self.pipeline.sample_decoder(data["features"], data["text"], settings, seed=SEED, callback=callback)

    def images(self, case: Case, data: dict[str, Tensor], steps: int) -> list[Image.Image]:
        settings = SamplingSettings(case.size, case.size, "linear", decoder_steps=steps)
        return self.pipeline.decode(self.pipeline.sample_decoder(data["features"], data["text"], settings, seed=SEED))
