"""Train Stage B, given features of the frozen encoder and text; v2's: noise prediction on Stage A latents."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..models.decoder import Decoder, DecoderParams
from ..models.prior import PriorParams
from ..models.vqgan import VQGAN
from ..pipeline import WuerstchenPipeline
from ..sampling import Sampling
from ..tables import from_table
from .chance import Chance
from .diffusion import DiffusionStage, NoisePrediction
from .inputs import features_of, frozen, latents_of, started
from .objectives import DecoderNoiseConfig, SpoiltFeatures, corrupt_features
from .stage import N


class StageB(DiffusionStage[N]):
    """What the Stages B of v1 and v2 share: features, spoilt at times, and Stage A's way back to pictures."""

    part: str  # of a bundle
    units = PriorParams()  # of the features
    spoilt: SpoiltFeatures

    def __init__(self, config: Mapping[str, Any]):
        super().__init__(config)
        self.vqgan = frozen(config, "vqgan", "vqgan", VQGAN)
        self.frozen = (*self.frozen, self.vqgan)
        self.features = self.pictures.each(partial(features_of, self.encoder))

    def given(self, picked: Any, chance: Chance) -> tuple[Tensor, ...]:
        return (corrupt_features(self.spoilt, self.features(picked), chance, self.units),)

    def reconstruct(self, net: N, images: Tensor, text: Tensor, sampling: Sampling) -> Tensor:
        """What is left of the pictures after 42.67x compression."""
        networks: dict[str, Any] = {self.part: net}
        pipeline = WuerstchenPipeline(vqgan=self.vqgan, **networks)
        return self.vqgan.decode(pipeline.sample_decoder(features_of(self.encoder, images), text, sampling))

    def parts(self, net: N) -> dict[str, nn.Module]:
        return {self.part: net}


class DecoderStage(StageB[Decoder], NoisePrediction[Decoder]):
    """v2's Stage B; no script of it was ever published, so noise, drops and weights are those of v1's and Stage C's."""

    name = part = "decoder"
    noise: DecoderNoiseConfig

    def __init__(self, config: Mapping[str, Any]):
        self.noise = self.spoilt = from_table(DecoderNoiseConfig, config.get("noise", {}), "noise")
        self.net = started(config, "decoder", Decoder, DecoderParams)
        super().__init__(config)
        self.latents = self.pictures.each(partial(latents_of, self.vqgan))
