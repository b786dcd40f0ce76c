"""Trains v2's Stage B: predicts noise in Stage A latents, given the frozen image encoder's features and text."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ...common.dataclass_config import from_table
from ...inference.pipeline import WuerstchenPipeline
from ...inference.settings import SamplingSettings
from ...inference.stages import first_weight
from ...models.decoder import Decoder, DecoderParams
from ...models.prior import PriorParams
from ...models.vqgan import VQGAN
from ..config import START
from ..data.caption_tokens import Tokens
from ..reconstruction import STAGE_A
from ..rng import StepRandom
from ..stage import N
from .diffusion import TEXT_ENCODER, DiffusionStage
from .losses import DecoderNoiseConfig, FeatureCorruption, corrupt_features
from .networks import encode_features, encode_latents, encode_text, load_frozen, load_or_create


class StageB(DiffusionStage[N]):
    """Shared by v1's and v2's Stage B: conditioning on corrupted features, and samples decoded by Stage A."""

    noise: FeatureCorruption
    text_part = "decoder_text_encoder"
    units = PriorParams()  # the scale and shift of the features
    inputs = {**DiffusionStage.inputs, "latents": "vqgan"}

    def __init__(self, config: Mapping[str, Any]):
        super().__init__(config)
        self.features = self.dataset.map_images("features", lambda images: encode_features(self.encoder, images))

    @cached_property
    def vqgan(self) -> VQGAN:
        return load_frozen(self.config, "vqgan", VQGAN)

    def conditioning(self, picked: Any, rng: StepRandom) -> tuple[Tensor, ...]:
        return (corrupt_features(self.noise, self.features(picked), rng, self.units),)

    def reconstructions(self, net: N, images: Tensor) -> dict[str, Tensor]:
        device = first_weight(net).device
        vqgan = self.vqgan.to(device)
        return {STAGE_A: vqgan.decode(vqgan.encode(images.to(device)))}

    def reconstruct(
        self, net: N, images: Tensor, tokens: list[Tokens], sampling: SamplingSettings, *inputs: Tensor
    ) -> Tensor:
        """Returns the images after 42.67x compression."""
        device = first_weight(net).device
        encoder, vqgan = self.encoder.to(device), self.vqgan.to(device)
        text_encoder = getattr(net, TEXT_ENCODER, self.text_encoder).to(device)
        networks: dict[str, Any] = {self.network: net, self.text_part: text_encoder}
        text = torch.stack(encode_text(text_encoder, tokens))
        pipeline = WuerstchenPipeline(vqgan=vqgan, **networks)
        return vqgan.decode(pipeline.sample_decoder(encode_features(encoder, images), text, sampling))


class DecoderStage(StageB[Decoder]):
    """v2's Stage B. No script was published: features are corrupted as in v1, the loss is weighted as for Stage C."""

    name = part = network = "decoder"
    validation_noise = DecoderNoiseConfig(stratified=True, text_drop=0.0, weight="v", drop=0.0, noised=0.0)
    tables = {"start": START, "model": DecoderParams, "noise": DecoderNoiseConfig}

    def __init__(self, config: Mapping[str, Any]):
        self.noise = from_table(DecoderNoiseConfig, config.get("noise", {}), "noise")
        self.net = self.build(config)
        super().__init__(config)
        self.latents = self.dataset.map_images("latents", lambda images: encode_latents(self.vqgan, images))

    def build(self, config: Mapping[str, Any]) -> Decoder:
        """Returns the network to train."""
        return load_or_create(config, "decoder", Decoder)
