"""This implementation, called as its users call it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from wuerstchen_core import checkpoints
from wuerstchen_core.inference.pipeline import WuerstchenPipeline
from wuerstchen_core.inference.settings import SamplingSettings

from .cases import PRIOR_GUIDANCE, SEED, Case
from .measure import Callback, Setting, Side


class Wuerstchen(Side):
    def __init__(self, setting: Setting):
        super().__init__(setting)
        self.pipeline = WuerstchenPipeline(**self.networks)

    def load(self, part: str, path: Path) -> Any:
        return getattr(checkpoints, f"load_{part}")(path, device=self.setting.device, dtype=self.setting.dtype)

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
