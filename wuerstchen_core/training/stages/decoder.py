"""Trains Stage B, given features of the frozen image encoder and text. v2's predicts noise in Stage A latents."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from torch import Tensor

from ...common.dataclass_config import from_table
from ...inference.pipeline import WuerstchenPipeline
from ...inference.settings import SamplingSettings
from ...models.decoder import Decoder
from ...models.prior import PriorParams
from ...models.vqgan import VQGAN
from ..rng import StepRandom
from ..stage import N
from .diffusion import DiffusionStage
from .losses import DecoderNoiseConfig, FeatureCorruption, corrupt_features
from .networks import encode_features, encode_latents, encode_text, load_frozen, load_or_create


class StageB(DiffusionStage[N]):
    """Shared by the Stages B of v1 and v2: corrupted features as conditioning, and decoding by Stage A."""

    noise: FeatureCorruption
    text_part = "decoder_text_encoder"
    units = PriorParams()  # of the features
    inputs = {**DiffusionStage.inputs, "latents": "vqgan"}

    def __init__(self, config: Mapping[str, Any]):
        super().__init__(config)
        self.features = self.dataset.map_images("features", self.encode_features)

    @cached_property
    def vqgan(self) -> VQGAN:
        return load_frozen(self.config, "vqgan", VQGAN)

    def encode_latents(self, images: Tensor) -> Tensor:
        """Returns Stage A latents [B, 4, H / 4, W / 4] of unit variance."""
        return encode_latents(self.vqgan, images)

    def conditioning(self, picked: Any, rng: StepRandom) -> tuple[Tensor, ...]:
        return (corrupt_features(self.noise, self.features(picked), rng, self.units),)

    def reconstruct(self, net: N, images: Tensor, prompts: list[str], sampling: SamplingSettings) -> Tensor:
        """Returns the images after 42.67x compression."""
        networks: dict[str, Any] = {self.part: net}
        device = next(net.parameters()).device
        encoder, vqgan = self.encoder.to(device), self.vqgan.to(device)
        text = encode_text(self.text_encoder.to(device), prompts)
        pipeline = WuerstchenPipeline(vqgan=vqgan, **networks)
        return vqgan.decode(pipeline.sample_decoder(encode_features(encoder, images), text, sampling))


class DecoderStage(StageB[Decoder]):
    """v2's Stage B. Its script was never published: noise, drops and weights are those of v1's and of Stage C's."""

    name = part = "decoder"

    def __init__(self, config: Mapping[str, Any]):
        self.noise = from_table(DecoderNoiseConfig, config.get("noise", {}), "noise")
        self.net = load_or_create(config, "decoder", Decoder)
        super().__init__(config)
        self.latents = self.dataset.map_images("latents", self.encode_latents)
