"""Train Stage B of v2: noise prediction on Stage A latents, given features of the frozen encoder and text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..models.decoder import Decoder, DecoderParams
from ..models.vqgan import VQGAN
from ..pipeline import WuerstchenPipeline
from ..sampling import Sampling
from ..tables import from_table
from .diffusion import DiffusionStage
from .inputs import features_of, frozen, latents_of
from .objectives import DecoderNoiseConfig, corrupt_features


class DecoderStage(DiffusionStage[Decoder]):
    """v2's Stage B; no script of it was ever published, so noise, drops and weights are those of v1's and Stage C's."""

    name = "decoder"
    noise: DecoderNoiseConfig

    def __init__(self, config: Mapping[str, Any]):
        self.noise = from_table(DecoderNoiseConfig, config.get("noise", {}), "noise")
        self.net = Decoder(from_table(DecoderParams, config["model"], "model"))
        self.net.init_weights()
        super().__init__(config)
        self.vqgan = frozen(config, "vqgan", "vqgan", VQGAN)
        self.latents = latents_of(self.vqgan, self.pictures)
        self.features = features_of(self.encoder, self.pictures)
        self.held_features = features_of(self.encoder, self.held)

    def given(self, picked: Tensor, rng: torch.Generator) -> tuple[Tensor, ...]:
        return (corrupt_features(self.noise, self.features[picked], rng),)

    def reconstruct(self, net: Decoder, picked: Tensor, text: Tensor, sampling: Sampling) -> Tensor:
        """What is left of the pictures after 42.67x compression."""
        pipeline = WuerstchenPipeline(decoder=net, vqgan=self.vqgan)
        return self.vqgan.decode(pipeline.sample_decoder(self.held_features[picked], text, sampling))

    def parts(self, net: Decoder) -> dict[str, nn.Module]:
        return {"decoder": net}
