"""Stage C: the text-conditional prior over 42.67x compressed latents (Würstchen, arXiv 2306.00637, section 3.3)."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..common.dataclass_config import option
from .attention import AttnBlock, KeysValues
from .init import init_blocks, xavier_init
from .layers import ChannelNorm, ResBlock, TimestepBlock, channels_last, timestep_embedding
from .operations import Operations, from_namespace


@dataclass(frozen=True)
class PriorParams:
    """Sizes of a Prior; the defaults are v2's."""

    c_in: int = option(16, "channels of the latents")
    c: int = option(1536, "channels")
    c_cond: int = option(1280, "width of the text states: CLIP-bigG in v2, 1024 (CLIP-H) in v1")
    c_r: int = option(64, "channels of the time embedding")
    depth: int = option(32, "blocks")
    nhead: int = option(24, "attention heads")
    feature_scale: float = option(42.0, "latents are (features + shift) / scale; v1: 1; not in the state dict")
    feature_shift: float = option(1.0, "v1: 0")
    dropout: float = option(0.0, "dropout (the original trains with 0.1)")


# The fields in which v1's prior differs.
V1 = {"c_cond": 1024, "feature_scale": 1.0, "feature_shift": 0.0}


def latents_from_features(features: Tensor, params: PriorParams = PriorParams()) -> Tensor:  # noqa: B008 (frozen)
    """Converts features of the image encoder to a prior's latents (v2's by default)."""
    return (features + params.feature_shift) / params.feature_scale


def features_from_latents(latents: Tensor, params: PriorParams = PriorParams()) -> Tensor:  # noqa: B008 (frozen)
    """Converts a prior's latents to features, which the image encoder returns and Stage B takes."""
    return latents * params.feature_scale - params.feature_shift


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
        attention = from_namespace(operations, AttnBlock)
        for _ in range(p.depth):
            self.blocks.append(ResBlock(p.c, dropout=p.dropout, operations=operations, **factory))
            self.blocks.append(TimestepBlock(p.c, p.c_r, operations, **factory))
            self.blocks.append(attention(p.c, p.c, p.nhead, dropout=p.dropout, operations=operations, **factory))
        self.out = nn.Sequential(ChannelNorm(), operations.Conv2d(p.c, p.c_in * 2, kernel_size=1, **factory))

    def init_weights(self) -> None:
        """Initialises the weights as the original does before training."""
        self.apply(xavier_init)
        for layer in (self.projection, self.cond_mapper[0], self.cond_mapper[2]):
            nn.init.normal_(layer.get_parameter("weight"), std=0.02)
        nn.init.zeros_(self.out[1].get_parameter("weight"))
        init_blocks(self.blocks, self.params.depth)

    def keys_values(self, text: Tensor) -> tuple[KeysValues, ...]:
        """Returns keys and values of text states [B, M, c_cond] for each attention block."""
        cond = self.cond_mapper(text)
        return tuple(block.keys_values(cond) for block in self.blocks if isinstance(block, AttnBlock))

    def run_block(
        self, index: int, x: Tensor, time: Tensor, cond: Tensor | KeysValues, mask: Tensor | None = None
    ) -> Tensor:
        """Runs one of `params.depth` blocks, three layers each, on x [B, c, h, w]."""
        convolution, modulation, attention = (self.blocks[3 * index + i] for i in range(3))
        return attention(modulation(convolution(x), time), cond, *(() if mask is None else (mask,)))

    def forward(
        self,
        latents: Tensor,
        t: Tensor,
        text: Tensor | tuple[KeysValues, ...],
        text_mask: Tensor | None = None,
        control: Sequence[Tensor | None] = (),
    ) -> Tensor:
        """Returns the noise [B, 16, h, w] in latents [B, 16, h, w] at times t [B] in [0, 1].

        `text`: text states [B, 77 n, c_cond], or their `keys_values`. In a batch of texts of different n,
        `text_mask` [B, 77 n] is False where the states are padding. `control`: what a `ControlNet` adds to the inputs
        of the blocks.
        """
        x = self.projection(channels_last(latents))
        cond = self.cond_mapper(text) if isinstance(text, Tensor) else None
        time = timestep_embedding(t, self.params.c_r).to(x.dtype)
        for i in range(self.params.depth):
            if i < len(control) and (added := control[i]) is not None:
                x = x + added.to(x.dtype)
            x = self.run_block(i, x, time, text[i] if cond is None else cond, text_mask)
        # In fp32: the noise is divided by a small difference, for which fp16 and bf16 have too few digits.
        a, b = self.out(x).float().chunk(2, dim=1)
        noise = (latents.float() - a) / ((1 - b).abs() + 1e-5)
        return noise.to(latents.dtype).contiguous(memory_format=torch.contiguous_format)


class KVCache:
    """Caches a prior's keys and values of recent texts; its weights must not change meanwhile.

    Computing them takes 1/30 of a step's products at 1024x1024 pixels and 1/9 at 512x512.
    """

    def __init__(self, prior: Prior):
        self._prior = prior
        # Samplers alternate between the conditional and the unconditional text.
        self._entries: deque[tuple[Tensor, tuple[KeysValues, ...]]] = deque(maxlen=4)

    def __call__(self, text: Tensor) -> tuple[KeysValues, ...]:
        """Returns `prior.keys_values(text)`; equal texts need not be the same tensor."""
        for other, found in self._entries:
            if other is text or (other.shape == text.shape and other.dtype == text.dtype and torch.equal(other, text)):
                return found
        new = self._prior.keys_values(text)
        self._entries.appendleft((text, new))
        return new
