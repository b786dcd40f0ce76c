"""Train Stage B of v1: which Stage A tokens stood where noise stands, given features and text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...common.dataclass_config import from_table
from ...diffusion.token_sampler import renoise
from ...inference.settings import SamplingSettings
from ...models.prior import V1, PriorParams
from ...models.token_decoder import TokenDecoder, TokenDecoderParams
from ..rng import StepRandom
from .decoder import StageB
from .losses import TokenNoiseConfig, token_loss
from .networks import encode_tokens, load_or_create

WIDEST = 8.0  # the coarsest frequency of `code_features` is so much slower than the finest


@dataclass(frozen=True)
class CodesConfig:
    """The `[codes]` table: what the network knows of the codes before it is trained.

    `width` is a distance in codebook units: codes that are nearer start as much the same to the network, as what goes
    in and as what comes out (random Fourier features: Rahimi and Recht, NIPS 2007). 0 leaves them all strangers to each
    other, as the original does, which sees each of them many thousand times.
    """

    width: float = 0.0

    def __post_init__(self) -> None:
        if self.width < 0:
            raise ValueError(f"[codes] width must be 0 or more, got {self.width}")


def code_features(codebook: Tensor, count: int, width: float) -> Tensor:
    """Features [K, count] of about unit length for codes [K, c]: their products fall with the codes' distances."""
    scales = width * WIDEST ** torch.linspace(0, 1, count)
    phases = torch.rand(count) * 2 * math.pi
    return torch.cos(codebook @ (torch.randn(codebook.shape[1], count) / scales) + phases) * math.sqrt(2 / count)


class TokenDecoderStage(StageB[TokenDecoder]):
    """v1's Stage B as the original trains it, but on the features of an encoder that is trained before."""

    name = "token-decoder"
    part = "token_decoder"
    tables: tuple[str, ...] = ("start", "model", "noise", "codes")
    units = PriorParams(feature_scale=V1["feature_scale"], feature_shift=V1["feature_shift"])
    noise: TokenNoiseConfig

    def __init__(self, config: Mapping[str, Any]):
        self.noise = self.spoilt = from_table(TokenNoiseConfig, config.get("noise", {}), "noise")
        codes = from_table(CodesConfig, config.get("codes", {}), "codes")
        self.net = load_or_create(config, "token_decoder", TokenDecoder, TokenDecoderParams)
        super().__init__(config)
        self.frozen = (*self.frozen, self.vqgan)  # for its codes, even where its latents are there
        codebook = self.vqgan.vquantizer.codebook.weight
        if len(codebook) != self.net.params.num_labels:
            raise ValueError(
                f"[model] num_labels is {self.net.params.num_labels}, but Stage A has {len(codebook)} codes: "
                "give it as many"
            )
        if codes.width and "start" not in config:
            self._acquaint(codebook, codes.width)
        self.tokens = self.dataset.map_images("latents", self.encode_latents, partial(encode_tokens, self.vqgan))

    @torch.no_grad()
    def _acquaint(self, codebook: Tensor, width: float) -> None:
        for layer in (self.net.in_mapper[0], self.net.out_mapper[1]):
            weight = layer.get_parameter("weight")
            features = code_features(codebook, weight.shape[1], width)
            weight.copy_(features.view(weight.shape))

    def noised(self, picked: Any, t: Tensor, rng: StepRandom) -> tuple[Tensor, ...]:
        tokens = self.tokens(picked)
        shape, count = tokens.shape[1:], tokens[0].numel()
        noise = rng.integers(self.net.params.num_labels, *shape)
        seen, replaced = renoise(tokens, noise, t, rng.uniform(*shape))
        places = rng.permutations(count)[:, : self.noise.places or count]
        tokens, replaced = (x.flatten(1).gather(1, places)[..., None] for x in (tokens, replaced))
        return seen, tokens, replaced, places

    def loss(self, net: TokenDecoder, *batch: Any) -> Tensor:
        seen, tokens, replaced, places, t, features, text = batch
        return token_loss(self.noise, net(seen, t, features, text, places), tokens, replaced, t)

    def reconstruct(self, net: TokenDecoder, images: Tensor, prompts: list[str], sampling: SamplingSettings) -> Tensor:
        return super().reconstruct(net, images, prompts, sampling.updated(decoder_steps=8))
