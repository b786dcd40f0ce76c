"""This implementation, through the doors that its users take."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoints import load_decoder, load_image_encoder, load_prior, load_vqgan
from ..devices import DTYPES
from ..models.image_encoder import semantic_view
from ..pipeline import WuerstchenPipeline
from .cases import STAGES, Case
from .inputs import SEED, inputs, one_call, sampling
from .weights import Sizes, weight_file

LOADERS: dict[str, Callable[..., Any]] = {
    "prior": load_prior,
    "decoder": load_decoder,
    "vqgan": load_vqgan,
    "image_encoder": load_image_encoder,
}


class Ours:
    """The networks of a stage, and its work."""

    def __init__(self, stage: str, folder: Path, sizes: Sizes, dtype: str, device: Any):
        self.sizes, self.device, self.dtype = sizes, device, DTYPES[dtype]
        networks = {
            part: LOADERS[part](weight_file(folder, part, dtype), device=device, dtype=self.dtype)
            for part in STAGES[stage].parts
        }
        self.pipeline = WuerstchenPipeline(**networks)

    def compile(self) -> None:
        """Let torch compile the networks, when they are first called."""
        pipeline = self.pipeline
        for network in (pipeline.prior, pipeline.decoder, pipeline.image_encoder):
            if network is not None:
                network.compile()
        if pipeline.vqgan is not None:
            for name in ("encode", "decode"):
                setattr(pipeline.vqgan, name, torch.compile(getattr(pipeline.vqgan, name)))

    def output(self, case: Case) -> Tensor:
        """What one call of the network gives."""
        pipeline = self.pipeline
        if STAGES[case.stage].steps:
            network: Any = pipeline.prior if case.stage == "prior" else pipeline.decoder
            x, t, *rest = one_call(case, self.sizes, self.device, self.dtype)
            return network(x, t, *rest)
        return self._call(case)()

    def run(self, case: Case, rounds: int, after: Callable[[], None]) -> None:
        """Do the work `rounds` times; `after` is called behind each."""
        if not STAGES[case.stage].steps:
            call = self._call(case)
            for _ in range(rounds):
                call()
                after()
            return
        given = inputs(case, self.sizes, self.device, self.dtype)
        told: dict[str, Any] = {"seed": SEED, "callback": lambda *_: after()}
        if case.stage == "prior":
            told["negative"] = given["prior_negative"]
            self.pipeline.sample_prior(given["prior_text"], sampling(case, rounds, 1), **told)
        else:
            told["negative"] = given["negative"]
            self.pipeline.sample_decoder(given["features"], given["text"], sampling(case, 1, rounds), **told)

    def _call(self, case: Case) -> Callable[[], Tensor]:
        """The work of a stage that has no steps."""
        given = inputs(case, self.sizes, self.device, self.dtype)
        pipeline: Any = self.pipeline
        if case.stage == "image-encoder":
            # The resize of bf16 pictures does not exist on every device.
            return lambda: pipeline.image_encoder(semantic_view(given["images"].float()).to(self.dtype))
        if case.stage == "vqgan-encode":
            return lambda: pipeline.vqgan.encode(given["images"])
        return lambda: pipeline.vqgan.decode(given["latents"])
