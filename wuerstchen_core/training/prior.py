"""Train Stage C: noise prediction on the frozen encoder's features, given text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..models.decoder import Decoder
from ..models.prior import Prior, PriorParams, latents_from_features
from ..models.vqgan import VQGAN
from ..pipeline import WuerstchenPipeline
from ..sampling import Sampling
from ..tables import from_table
from .diffusion import DiffusionStage
from .inputs import features_of, frozen
from .objectives import NoiseConfig


class PriorStage(DiffusionStage[Prior]):
    """Stage C as the original trains it, on cached features."""

    name = "prior"

    def __init__(self, config: Mapping[str, Any]):
        self.noise = from_table(NoiseConfig, config.get("noise", {}), "noise")
        self.net = Prior(from_table(PriorParams, config["model"], "model"))
        self.net.init_weights()
        super().__init__(config)
        self.latents = latents_from_features(features_of(self.encoder, self.pictures))

    def given(self, picked: Tensor, rng: torch.Generator) -> tuple[Tensor, ...]:
        return ()

    def reconstruct(self, net: Prior, picked: Tensor, text: Tensor, sampling: Sampling) -> Tensor | None:
        """The captions painted; only once the run has a decoder to paint with."""
        if not (Path(self.config["run"]) / "decoder" / "decoder.safetensors").exists():
            return None
        decoder = frozen(self.config, "decoder", "decoder", Decoder)
        vqgan = frozen(self.config, "vqgan", "vqgan", VQGAN)
        pipeline = WuerstchenPipeline(prior=net, decoder=decoder, vqgan=vqgan, prior_text_encoder=self.tower)
        return vqgan.decode(pipeline.sample_decoder(pipeline.sample_prior(text, sampling), text, sampling))

    def parts(self, net: Prior) -> dict[str, nn.Module]:
        return {"prior": net}
