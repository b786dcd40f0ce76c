"""Blocks that the networks share: one implementation of each, named as in the released weights.

Tensors are NCHW; in memory they are channels-last, so that every permute below is a view.
Layers come from a namespace (`operations`, default `pointwise.Operations`), which lets ComfyUI cast and offload them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.linear import Operations
from .mlp import EPS, ChannelwiseMLP, Injected

TIME_SCALE = 10_000  # radians that the quickest frequency of a time embedding turns from t = 0 to 1


def channels_last(x: Tensor) -> Tensor:
    """Put an NCHW tensor into channels-last memory order (nothing to do if it is already)."""
    return x.contiguous(memory_format=torch.channels_last)


def time_frequencies(dim: int, device: Any = None) -> Tensor:
    """The frequencies [dim // 2] of a time embedding, from 1 to 1 / TIME_SCALE; fp32."""
    half = dim // 2
    step = math.log(TIME_SCALE) / (half - 1)
    return torch.arange(half, device=device, dtype=torch.float32).mul(-step).exp()


# A compiled network has them as they are computed above: the last digit of the compiler's own exponential moves phases
# by 5e-4. This is all that `torch.compiler.assume_constant_result` does, and that would import the compiler.
time_frequencies._dynamo_marked_constant = True  # type: ignore[attr-defined]


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Sinusoidal embedding [B, dim] of times in [0, 1], [B]; computed in fp32.

    The order of the products is part of the model: t * TIME_SCALE first, then the frequency, else phases move by 5e-4.
    """
    angles = (t.float() * TIME_SCALE)[:, None] * time_frequencies(dim, t.device)[None, :]
    embedding = torch.cat([angles.sin(), angles.cos()], dim=1)
    return F.pad(embedding, (0, dim % 2))


class ChannelNorm(nn.Module):
    """LayerNorm over the channels of an NCHW tensor, without affine parameters."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2], eps=EPS).permute(0, 3, 1, 2)


class ResBlock(nn.Module):
    """ConvNeXt block; `skip` channels join after the depthwise convolution."""

    def __init__(
        self,
        c: int,
        c_skip: int = 0,
        kernel_size: int = 3,
        dropout: float = 0.0,
        operations: Any = Operations,
        **factory: Any,
    ):
        super().__init__()
        self.depthwise = operations.Conv2d(c, c, kernel_size=kernel_size, padding=kernel_size // 2, groups=c, **factory)
        self.norm = ChannelNorm()
        self.channelwise = ChannelwiseMLP(c + c_skip, c, dropout, operations, **factory)

    def forward(self, x: Tensor, skip: Tensor | None = None, injected: Injected | None = None) -> Tensor:
        h = self.norm(self.depthwise(x))
        if skip is not None:
            h = torch.cat([h, skip], dim=1)
        return x + self.channelwise(h.permute(0, 2, 3, 1), injected).permute(0, 3, 1, 2)


class EarlySkipResBlock(ResBlock):
    """v1's ConvNeXt block: `skip` channels join before the depthwise convolution, whose groups they fill."""

    def __init__(
        self,
        c: int,
        c_skip: int = 0,
        kernel_size: int = 3,
        dropout: float = 0.0,
        operations: Any = Operations,
        **factory: Any,
    ):
        super().__init__(c, 0, kernel_size, dropout, operations, **factory)
        self.depthwise = operations.Conv2d(
            c + c_skip, c, kernel_size=kernel_size, padding=kernel_size // 2, groups=c, **factory
        )

    def forward(self, x: Tensor, skip: Tensor | None = None, injected: Injected | None = None) -> Tensor:
        h = x if skip is None else torch.cat([x, skip], dim=1)
        return x + self.channelwise(self.norm(self.depthwise(h)).permute(0, 2, 3, 1), injected).permute(0, 3, 1, 2)


class FeedForwardBlock(nn.Module):
    """The pointwise half of a ResBlock."""

    def __init__(self, c: int, dropout: float = 0.0, operations: Any = Operations, **factory: Any):
        super().__init__()
        self.norm = ChannelNorm()
        self.channelwise = ChannelwiseMLP(c, c, dropout, operations, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.channelwise(self.norm(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class TimestepBlock(nn.Module):
    """Scale and shift by the time embedding."""

    def __init__(self, c: int, c_timestep: int, operations: Any = Operations, **factory: Any):
        super().__init__()
        self.mapper = operations.Linear(c_timestep, c * 2, **factory)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        scale, shift = self.mapper(t)[:, :, None, None].chunk(2, dim=1)
        return torch.addcmul(shift, x, 1 + scale)


def nearest_codes(rows: Tensor, codebook: Tensor, chunk: int = 16384) -> Tensor:
    """Index of the codebook row [K, c] nearest to each of rows [N, c]; in chunks, so N x K is never held whole."""
    return torch.cat([torch.cdist(part, codebook).argmin(dim=1) for part in rows.split(chunk)])
