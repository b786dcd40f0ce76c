"""Trains v1's Stage B: predicts Stage A tokens, some replaced by random ones, given image features and text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...common.dataclass_config import NotNegative, from_table, option
from ...diffusion.token_sampler import renoise
from ...inference.settings import SamplingSettings
from ...models.prior import V1, PriorParams
from ...models.token_decoder import TokenDecoder, TokenDecoderParams
from ..config import START
from ..data.caption_tokens import Tokens
from ..rng import StepRandom
from .decoder import StageB
from .losses import TokenNoiseConfig, token_loss
from .networks import encode_latents, encode_tokens, load_or_create

FREQUENCY_RANGE = 8.0  # finest to coarsest frequency of `code_features`


@dataclass(frozen=True)
class CodesConfig:
    """The `[codes]` table: initial similarity of the codes.

    `width` is a distance in codebook units. Codes that are nearer than that start with similar input and output weights
    (random Fourier features: Rahimi and Recht, NIPS 2007). 0: all codes start independent, as in the original, whose
    training is long enough to learn each of them.
    """

    width: NotNegative = option(0.0, "codes nearer than this start with similar weights; 0: all independent")


def code_features(codebook: Tensor, count: int, width: float) -> Tensor:
    """Returns features [K, count] of about unit length for codes [K, c], whose products fall with distance."""
    scales = width * FREQUENCY_RANGE ** torch.linspace(0, 1, count)
    phases = torch.rand(count) * 2 * math.pi
    return torch.cos(codebook @ (torch.randn(codebook.shape[1], count) / scales) + phases) * math.sqrt(2 / count)


class TokenDecoderStage(StageB[TokenDecoder]):
    """v1's Stage B as in the original, except that its image encoder was trained before."""

    name, part, network = "token-decoder", "token_decoder", "token_decoder"
    validation_noise = TokenNoiseConfig(stratified=True, text_drop=0.0, drop=0.0, noised=0.0)
    tables = {"start": START, "model": TokenDecoderParams, "noise": TokenNoiseConfig, "codes": CodesConfig}
    units = PriorParams(feature_scale=V1["feature_scale"], feature_shift=V1["feature_shift"])
    noise: TokenNoiseConfig

    def __init__(self, config: Mapping[str, Any]):
        self.noise = from_table(TokenNoiseConfig, config.get("noise", {}), "noise")
        codes = from_table(CodesConfig, config.get("codes", {}), "codes")
        self.net = self.build(config)
        super().__init__(config)
        self.frozen = [*self.frozen, self.vqgan]  # quantizes latents even if these are cached
        codebook = self.vqgan.vquantizer.codebook.weight
        if len(codebook) != self.net.params.num_labels:
            labels = self.net.params.num_labels
            raise ValueError(f"[model] num_labels must be {len(codebook)}, the number of Stage A's codes, got {labels}")
        if codes.width and "start" not in config:
            for layer in (self.net.in_mapper[0], self.net.out_mapper[1]):
                weight = layer.get_parameter("weight")
                weight.data.copy_(code_features(codebook.detach(), weight.shape[1], codes.width).view(weight.shape))
        to_tokens = partial(encode_tokens, self.vqgan)
        self.latents = self.dataset.map_images("latents", lambda x: encode_latents(self.vqgan, x), to_tokens)

    def build(self, config: Mapping[str, Any]) -> TokenDecoder:
        """Returns the network to train."""
        return load_or_create(config, "token_decoder", TokenDecoder)

    def noised(self, picked: Any, t: Tensor, rng: StepRandom) -> tuple[Tensor, ...]:
        tokens = self.latents(picked)
        shape, count = tokens.shape[1:], tokens[0].numel()
        noise = rng.integers(self.net.params.num_labels, *shape)
        noised, replaced = renoise(tokens, noise, t, rng.uniform(*shape))
        indices = rng.permutations(count)[:, : self.noise.places or count]
        tokens, replaced = (x.flatten(1).gather(1, indices)[..., None] for x in (tokens, replaced))
        return noised, tokens, replaced, indices

    def loss(self, net: TokenDecoder, *batch: Any) -> Tensor:
        weights, noised, tokens, replaced, indices, t, features, text, mask = batch
        logits = net(noised, t, features, text, indices, mask)
        weights = None if weights is None else weights.flatten(1).gather(1, indices)[..., None]
        return token_loss(self.noise, logits, tokens, replaced, t, weights)

    def reconstruct(
        self, net: TokenDecoder, images: Tensor, tokens: list[Tokens], sampling: SamplingSettings, *inputs: Tensor
    ) -> Tensor:
        return super().reconstruct(net, images, tokens, sampling.updated(decoder_steps=8), *inputs)
