"""This implementation, through the doors that its users take."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from PIL import Image
from torch import Tensor

from wuerstchen_core.checkpoints import load_decoder, load_image_encoder, load_prior, load_vqgan
from wuerstchen_core.common.devices import DTYPES
from wuerstchen_core.inference.pipeline import WuerstchenPipeline
from wuerstchen_core.models.image_encoder import semantic_view

from .cases import PICTURE, STAGES, Case
from .inputs import SEED, inputs, one_call, sampling
from .picture import Steps, pixels, steps_done
from .setting import Setting
from .weights import weight_file

LOADERS: dict[str, Callable[..., Any]] = {
    "prior": load_prior,
    "decoder": load_decoder,
    "vqgan": load_vqgan,
    "image_encoder": load_image_encoder,
}


class Ours:
    """The networks of a stage, and its work."""

    left_out = 0.0

    def __init__(self, setting: Setting):
        self.setting, self.dtype = setting, setting.compute or DTYPES[setting.dtype]
        stage, device = STAGES[setting.stage], setting.device
        files = {part: weight_file(setting.folder, part, setting.dtype) for part in (*stage.parts, *stage.beside)}
        if setting.stage == PICTURE:  # as its users load it
            self.pipeline = WuerstchenPipeline.load(files, device=device, dtype=self.dtype)
        else:
            networks = {part: LOADERS[part](file, device=device, dtype=self.dtype) for part, file in files.items()}
            self.pipeline = WuerstchenPipeline(**networks)

    def compile(self) -> None:
        """Let torch compile what it does for the pipeline's users."""
        self.pipeline.compile()

    def output(self, case: Case) -> Tensor:
        """What one call of the network gives; of a picture, its pixels [B, 3, H, W]."""
        if not STAGES[case.stage].steps:
            return self._call(case)()
        network: Any = self.pipeline.prior if case.stage == "prior" else self.pipeline.decoder
        return network(*one_call(case, self.setting.sizes, self.setting.device, self.dtype))

    def run(self, case: Case, rounds: int, after: Callable[[], None]) -> None:
        """Do the work `rounds` times; `after` is called behind each."""
        if not STAGES[case.stage].steps:
            call = self._call(case)
            for _ in range(rounds):
                call()
                after()
            return
        given = inputs(case, self.setting.sizes, self.setting.device, self.dtype)
        told: dict[str, Any] = {"seed": SEED, "callback": lambda *_: after()}
        if case.stage == "prior":
            told["negative"] = given["prior_negative"]
            self.pipeline.sample_prior(given["prior_text"], sampling(case, rounds, 1), **told)
        else:
            told["negative"] = given["negative"]
            self.pipeline.sample_decoder(given["features"], given["text"], sampling(case, 1, rounds), **told)

    def _call(self, case: Case) -> Callable[[], Tensor]:
        """The work of a stage that is not measured by steps."""
        given = inputs(case, self.setting.sizes, self.setting.device, self.dtype)
        pipeline: Any = self.pipeline
        if case.stage == PICTURE:
            return lambda: pixels(self._paint(case, given))
        if case.stage == "image-encoder":
            # The resize of bf16 pictures does not exist on every device.
            return lambda: pipeline.image_encoder(semantic_view(given["images"].float()).to(self.dtype))
        return partial(getattr(pipeline.vqgan, case.stage.removeprefix("vqgan-")), *given.values())

    def _paint(self, case: Case, given: dict[str, Tensor]) -> list[Image.Image]:
        """Pictures of text states."""
        told = sampling(case, *steps_done(self.setting, self.setting.steps))
        steps = Steps(self.setting.clock)
        watch: dict[str, Any] = {"seed": SEED, "callback": lambda stage, *_: steps.done(stage)}
        features = self.pipeline.sample_prior(given["prior_text"], told, negative=given["prior_negative"], **watch)
        steps.begin()
        latents = self.pipeline.sample_decoder(features, given["text"], told, negative=given["negative"], **watch)
        pictures = self.pipeline.decode(latents)
        self.left_out = steps.left_out(self.setting.steps)
        return pictures
