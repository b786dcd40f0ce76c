"""Stage C: the text-conditional prior over 42.67x compressed latents (Würstchen, arXiv 2306.00637, section 3.3)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.linear import Operations
from .attention import AttnBlock, Read
from .init import init_blocks, xavier_init
from .layers import ChannelNorm, ResBlock, TimestepBlock, channels_last, timestep_embedding


@dataclass(frozen=True)
class PriorParams:
    """Sizes of a Prior; the defaults are v2's."""

    c_in: int = 16
    c: int = 1536
    c_cond: int = 1280  # width of the text states: CLIP-bigG in v2, 1024 (CLIP-H) in v1
    c_r: int = 64
    depth: int = 32
    nhead: int = 24
    feature_scale: float = 42.0  # the prior works on (features + shift) / scale; 1 and 0 in v1, and in no tensor
    feature_shift: float = 1.0
    dropout: float = 0.0  # the original trains with 0.1


# What of v1's prior differs from v2's.
V1 = {"c_cond": 1024, "feature_scale": 1.0, "feature_shift": 0.0}


def latents_from_features(features: Tensor, params: PriorParams = PriorParams()) -> Tensor:  # noqa: B008 (frozen)
    """Features of the image encoder to the latents that a prior works on (v2's by default)."""
    return (features + params.feature_shift) / params.feature_scale


def features_from_latents(latents: Tensor, params: PriorParams = PriorParams()) -> Tensor:  # noqa: B008 (frozen)
    """What a prior works on to features as the image encoder gives them and Stage B takes them."""
    return latents * params.feature_scale - params.feature_shift


Reading = tuple[Read, ...]  # of a text, by each of a prior's blocks


class Prior(nn.Module):
    """Predicts the noise in Stage C latents from text states."""

    def __init__(self, params: PriorParams, *, operations: Any = Operations, device: Any = None, dtype: Any = None):
        super().__init__()
        p, factory = params, {"device": device, "dtype": dtype}
        self.params = params
        self.projection = operations.Conv2d(p.c_in, p.c, kernel_size=1, **factory)
        self.cond_mapper = nn.Sequential(
            operations.Linear(p.c_cond, p.c, **factory),
            nn.LeakyReLU(0.2),
            operations.Linear(p.c, p.c, **factory),
        )
        self.blocks = nn.ModuleList()
        for _ in range(p.depth):
            self.blocks.append(ResBlock(p.c, dropout=p.dropout, operations=operations, **factory))
            self.blocks.append(TimestepBlock(p.c, p.c_r, operations, **factory))
            self.blocks.append(AttnBlock(p.c, p.c, p.nhead, dropout=p.dropout, operations=operations, **factory))
        self.out = nn.Sequential(ChannelNorm(), operations.Conv2d(p.c, p.c_in * 2, kernel_size=1, **factory))

    def init_weights(self) -> None:
        """Initialise as the original does before training."""
        self.apply(xavier_init)
        for layer in (self.projection, self.cond_mapper[0], self.cond_mapper[2]):
            nn.init.normal_(layer.get_parameter("weight"), std=0.02)
        nn.init.zeros_(self.out[1].get_parameter("weight"))
        init_blocks(self.blocks, self.params.depth)

    def read(self, text: Tensor) -> Reading:
        """What each block knows of text states [B, M, c_cond], at whatever time."""
        cond = self.cond_mapper(text)
        return tuple(block.read(cond) for block in self.blocks if isinstance(block, AttnBlock))

    def forward(self, latents: Tensor, t: Tensor, text: Tensor | Reading) -> Tensor:
        """Noise [B, 16, h, w] in latents [B, 16, h, w] at times t [B] in [0, 1], given text [B, 77, c_cond].

        Instead of the text, what was read of it will do.
        """
        x = self.projection(channels_last(latents))
        known = repeat(self.cond_mapper(text)) if isinstance(text, Tensor) else iter(text)
        time = timestep_embedding(t, self.params.c_r).to(x.dtype)
        for block in self.blocks:
            if isinstance(block, AttnBlock):
                x = block(x, next(known))
            elif isinstance(block, TimestepBlock):
                x = block(x, time)
            else:
                x = block(x)
        # The last step divides by a difference: fp16 and bf16 have too few digits for it.
        a, b = self.out(x).float().chunk(2, dim=1)
        noise = (latents.float() - a) / ((1 - b).abs() + 1e-5)
        return noise.to(latents.dtype).contiguous(memory_format=torch.contiguous_format)


class ReadOnce:
    """A prior's reading of the texts that come again and again, while its weights stay as they are.

    It is a thirtieth of a step's products at 1024x1024 pixels, and a ninth at 512x512.
    """

    TEXTS = 4  # that are remembered: some callers give both texts of guidance in turn

    def __init__(self, prior: Prior):
        self._prior = prior
        self._known: list[tuple[Tensor, Reading]] = []

    def __call__(self, text: Tensor) -> Reading:
        """The reading of text states [B, M, c_cond], which may be a copy of those that came before."""
        for other, reading in self._known:
            if other is text or (other.shape == text.shape and other.dtype == text.dtype and torch.equal(other, text)):
                return reading
        reading = self._prior.read(text)
        self._known = [(text, reading), *self._known[: self.TEXTS - 1]]
        return reading
