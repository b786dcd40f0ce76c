"""Train Stage B, given features of the frozen encoder and text; v2's: noise prediction on Stage A latents."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from ...common.dataclass_config import from_table
from ...inference.pipeline import WuerstchenPipeline
from ...inference.settings import SamplingSettings
from ...models.decoder import Decoder, DecoderParams
from ...models.prior import PriorParams
from ...models.vqgan import VQGAN
from ..rng import StepRandom
from ..stage import N
from .diffusion import DiffusionStage, NoisePrediction
from .losses import DecoderNoiseConfig, FeatureCorruption, corrupt_features
from .networks import encode_features, encode_latents, encode_text, load_frozen, load_or_create


class StageB(DiffusionStage[N]):
    """What the Stages B of v1 and v2 share: features, spoilt at times, and Stage A's way back to pictures."""

    part: str  # of a bundle
    reads = "decoder_text_encoder"
    units = PriorParams()  # of the features
    spoilt: FeatureCorruption
    networks = {**DiffusionStage.networks, "latents": "vqgan"}

    def __init__(self, config: Mapping[str, Any]):
        super().__init__(config)
        self.features = self.dataset.map_images("features", self.encode_features)

    @cached_property
    def vqgan(self) -> VQGAN:
        return load_frozen(self.config, "vqgan", "vqgan", VQGAN)

    def encode_latents(self, images: Tensor) -> Tensor:
        """Latents [B, 4, H / 4, W / 4] of unit variance of pictures [B, 3, H, W] in [0, 1]."""
        return encode_latents(self.vqgan, images)

    def given(self, picked: Any, rng: StepRandom) -> tuple[Tensor, ...]:
        return (corrupt_features(self.spoilt, self.features(picked), rng, self.units),)

    def reconstruct(self, net: N, images: Tensor, prompts: list[str], sampling: SamplingSettings) -> Tensor:
        """What is left of the pictures after 42.67x compression."""
        networks: dict[str, Any] = {self.part: net}
        place = next(net.parameters()).device
        encoder, vqgan = self.encoder.to(place), self.vqgan.to(place)
        text = encode_text(self.tower.to(place), prompts)
        pipeline = WuerstchenPipeline(vqgan=vqgan, **networks)
        return vqgan.decode(pipeline.sample_decoder(encode_features(encoder, images), text, sampling))

    def parts(self, net: N) -> dict[str, nn.Module]:
        return {self.part: net}


class DecoderStage(StageB[Decoder], NoisePrediction[Decoder]):
    """v2's Stage B; no script of it was ever published, so noise, drops and weights are those of v1's and Stage C's."""

    name = part = "decoder"
    noise: DecoderNoiseConfig

    def __init__(self, config: Mapping[str, Any]):
        self.noise = self.spoilt = from_table(DecoderNoiseConfig, config.get("noise", {}), "noise")
        self.net = load_or_create(config, "decoder", Decoder, DecoderParams)
        super().__init__(config)
        self.latents = self.dataset.map_images("latents", self.encode_latents)
