"""Blocks shared by the networks, named as in the released weights.

Tensors are NCHW, in channels-last memory order, so that every permute below is a view.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.dispatch import HasWeights, accelerated_by
from ..kernels.mlp import MappedLatents, mlp
from .operations import Operations, from_namespace

EPS = 1e-6  # of every norm in Würstchen
TIME_SCALE = 10_000  # radians by which the highest frequency of a time embedding turns from t = 0 to 1


def channels_last(x: Tensor) -> Tensor:
    """Returns an NCHW tensor in channels-last memory order."""
    return x.contiguous(memory_format=torch.channels_last)


def time_frequencies(dim: int, device: Any = None) -> Tensor:
    """Returns the frequencies [dim // 2] of a time embedding, from 1 to 1 / TIME_SCALE, in fp32."""
    half = dim // 2
    step = math.log(TIME_SCALE) / (half - 1)
    return torch.arange(half, device=device, dtype=torch.float32).mul(-step).exp()


# Compiled networks use these values as constants: the last digit of inductor's own exp moves phases by 5e-4.
# This is all that `torch.compiler.assume_constant_result` does, but calling that would import the compiler.
time_frequencies._dynamo_marked_constant = True  # type: ignore[attr-defined]


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Sinusoidal embedding [B, dim] of times [B] in [0, 1], in fp32.

    The order of the products is part of the model: t * TIME_SCALE first, then the frequency, else phases move by 5e-4.
    """
    angles = (t.float() * TIME_SCALE)[:, None] * time_frequencies(dim, t.device)[None, :]
    embedding = torch.cat([angles.sin(), angles.cos()], dim=1)
    return F.pad(embedding, (0, dim % 2))


class ChannelNorm(nn.Module):
    """LayerNorm over the channels of an NCHW tensor, without affine parameters."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2], eps=EPS).permute(0, 3, 1, 2)


class GlobalResponseNorm(HasWeights, nn.Module):
    """Global response normalisation (ConvNeXt V2, arXiv 2301.00808, section 3) over [B, H, W, C]."""

    def __init__(self, dim: int, *, device: Any = None, dtype: Any = None):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, dim, device=device, dtype=dtype))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, dim, device=device, dtype=dtype))

    def weights(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns gamma and beta in x's dtype (under autocast, fp32 parameters would promote the result to fp32)."""
        return self.gamma.to(x.dtype), self.beta.to(x.dtype)

    def energy(self, x: Tensor) -> Tensor:
        """Returns each channel's sum of squares [B, 1, 1, C]; on a CPU several times faster than a vector norm."""
        if x.dtype == torch.float16:  # squares overflow: sum in fp32, without an fp32 copy of x
            return torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=torch.float32).square()
        return x.square().sum(dim=(1, 2), keepdim=True)

    def scale(self, energy: Tensor, gamma: Tensor) -> Tensor:
        """Returns the factor [B, 1, 1, C] of each channel."""
        norm = (energy + 1e-12).sqrt()  # keeps the gradient finite where a whole channel is zero
        return gamma * (norm / (norm.mean(dim=-1, keepdim=True) + EPS)).to(gamma.dtype) + 1

    def scaled(self, x: Tensor, energy: Tensor) -> Tensor:
        """Normalises x [B, H, W, C], or a part of it, given the energy of the whole."""
        gamma, beta = self.weights(x)
        return torch.addcmul(beta, x, self.scale(energy, gamma))

    def forward(self, x: Tensor) -> Tensor:
        return self.scaled(x, self.energy(x))


class ChannelwiseMLP(nn.Sequential):
    """Pointwise MLP with global response normalisation over [B, H, W, C].

    The dropout layer is always there: the key names of the last layer depend on it.
    """

    def __init__(self, c_in: int, c: int, dropout: float, operations: Any = Operations, **factory: Any):
        super().__init__(
            operations.Linear(c_in, c * 4, **factory),
            nn.GELU(),
            from_namespace(operations, GlobalResponseNorm)(c * 4, **factory),
            nn.Dropout(dropout),
            operations.Linear(c * 4, c, **factory),
        )

    @accelerated_by(mlp)
    def forward(self, x: Tensor, injected: MappedLatents | None = None) -> Tensor:
        """[B, H, W, c_in] to [B, H, W, c]; the mapped latents in `injected` are the last of the c_in channels."""
        return super().forward(x if injected is None else injected.append_to(x))


class ResBlock(nn.Module):
    """ConvNeXt block; `skip` channels join after the depthwise convolution."""

    def __init__(
        self, c: int, c_skip: int = 0, kernel_size: int = 3, dropout: float = 0.0, *, operations: Any, **factory: Any
    ):
        super().__init__()
        self.depthwise = operations.Conv2d(c, c, kernel_size=kernel_size, padding=kernel_size // 2, groups=c, **factory)
        self.norm = ChannelNorm()
        self.channelwise = ChannelwiseMLP(c + c_skip, c, dropout, operations, **factory)

    def forward(self, x: Tensor, skip: Tensor | None = None, injected: MappedLatents | None = None) -> Tensor:
        h = self.norm(self.depthwise(x))
        if skip is not None:
            h = torch.cat([h, skip], dim=1)
        return x + self.channelwise(h.permute(0, 2, 3, 1), injected).permute(0, 3, 1, 2)


class EarlySkipResBlock(ResBlock):
    """v1's ConvNeXt block: `skip` channels join before the depthwise convolution and take part in its groups."""

    def __init__(self, c: int, c_skip: int, kernel_size: int, dropout: float, *, operations: Any, **factory: Any):
        super().__init__(c, 0, kernel_size, dropout, operations=operations, **factory)
        self.depthwise = operations.Conv2d(c + c_skip, c, kernel_size, padding=kernel_size // 2, groups=c, **factory)

    def forward(self, x: Tensor, skip: Tensor | None = None, injected: MappedLatents | None = None) -> Tensor:
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
    """Scales and shifts each channel by amounts computed from the time embedding."""

    def __init__(self, c: int, c_timestep: int, operations: Any = Operations, **factory: Any):
        super().__init__()
        self.mapper = operations.Linear(c_timestep, c * 2, **factory)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        scale, shift = self.mapper(t)[:, :, None, None].chunk(2, dim=1)
        return torch.addcmul(shift, x, 1 + scale)


def nearest_codes(vectors: Tensor, codebook: Tensor, chunk: int = 16384) -> Tensor:
    """Returns the index [N] of the code [K, c] nearest to each vector [N, c], in chunks that limit the memory."""
    return torch.cat([torch.cdist(part, codebook).argmin(dim=1) for part in vectors.split(chunk)])
