"""Blocks that the networks share: one implementation of each, named as in the released weights.

Tensors are NCHW; in memory they are channels-last, so that every permute below is a view.
Layers come from a namespace (`operations`, default `pointwise.Operations`), which lets ComfyUI cast and offload them.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .pointwise import Operations, bare, plain_cpu, product

M = TypeVar("M", bound=nn.Module)

EPS = 1e-6  # of every LayerNorm in Würstchen
MANY, ROWS = 256, 2048  # places from which on an MLP works in pieces, and how many a piece has
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


class GlobalResponseNorm(nn.Module):
    """Global response normalisation (ConvNeXt V2, arXiv 2301.00808, section 3) over [B, H, W, C]."""

    def __init__(self, dim: int, *, device: Any = None, dtype: Any = None):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, dim, device=device, dtype=dtype))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, dim, device=device, dtype=dtype))

    def affine(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Gamma and beta as `x` needs them (under autocast, fp32 parameters would pull the product up to fp32)."""
        return self.gamma.to(x.dtype), self.beta.to(x.dtype)

    def energy(self, x: Tensor) -> Tensor:
        """The sum of squares of each channel [B, 1, 1, C].

        The plain sum is several times faster on a CPU than a vector norm.
        """
        if x.dtype == torch.float16:  # squares leave its range: they are summed in fp32, and never held
            return torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=torch.float32).square()
        return x.square().sum(dim=(1, 2), keepdim=True)

    def scaled(self, x: Tensor, energy: Tensor) -> Tensor:
        """x [B, H, W, C], or a part of it, by its response to the energy of the whole."""
        gamma, beta = self.affine(x)
        norm = (energy + 1e-12).sqrt()  # the tiny term keeps the gradient finite where a channel is zero everywhere
        response = (norm / (norm.mean(dim=-1, keepdim=True) + EPS)).to(x.dtype)
        return torch.addcmul(beta, x, gamma * response + 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.scaled(x, self.energy(x))


def own(operations: Any, layer: type[M]) -> type[M]:
    """The namespace's own version of one of our layers, if it has one: without bare parameters, or casting them."""
    return getattr(operations, layer.__name__, layer)


class Injected(NamedTuple):
    """What joins the input of an MLP: `mapper`, a 1x1 convolution [c_mapped, c, 1, 1], of latents [B, c, H, W]."""

    latents: Tensor
    mapper: nn.Module


class ChannelwiseMLP(nn.Sequential):
    """Pointwise MLP with global response normalisation; dropout keeps its slot, since keys depend on it."""

    def __init__(self, c_in: int, c: int, dropout: float, operations: Any, **factory: Any):
        super().__init__(
            operations.Linear(c_in, c * 4, **factory),
            nn.GELU(),
            own(operations, GlobalResponseNorm)(c * 4, **factory),
            nn.Dropout(dropout),
            operations.Linear(c * 4, c, **factory),
        )

    def forward(self, x: Tensor, injected: Injected | None = None) -> Tensor:
        """x [B, H, W, c_in] to [B, H, W, c]; the last of the c_in channels are those of `injected`, if it is given."""
        layers: Any = self
        first, gelu, norm, dropout, last = layers
        linear = (first, last) if injected is None else (first, last, injected.mapper)
        # In this order: a graph is not to depend on how many places there are.
        if plain_cpu(x) and not self.training and x.shape[1] * x.shape[2] >= MANY and all(map(bare, linear)):
            return self._fast(x, injected)
        if injected is not None:
            x = torch.cat([x, injected.mapper(injected.latents.to(x.dtype)).permute(0, 2, 3, 1)], dim=-1)
        return last(dropout(norm(gelu(first(x)))))

    def _fast(self, x: Tensor, injected: Injected | None) -> Tensor:
        """The same by fewer products, and in pieces that fit a CPU's cache.

        Prior, 1024x1024 pixels, bf16: 0.9 of the time; Stage B's finest level 0.6.
        """
        layers: Any = self
        first, _, norm, _, last = layers
        (weight, bias), project = first.ready(x), last.ready(x)
        if injected is not None:
            x, weight, bias = joined(x, injected, weight, bias)
        pictures = []
        for one in x.flatten(1, 2):
            hidden = [product(piece, weight, bias, gelu=True)[None, None] for piece in one.split(ROWS)]
            energy = torch.stack([norm.energy(piece).float() for piece in hidden]).sum(dim=0)
            pictures.append(torch.cat([product(norm.scaled(piece, energy), *project)[0, 0] for piece in hidden]))
        return torch.stack(pictures).unflatten(1, x.shape[1:3])


def joined(x: Tensor, injected: Injected, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The input, weight and bias of an MLP's first layer, with what is injected.

    This goes through two linear maps, one after the other. Made one, they take its 16 channels instead of 1024: a
    sixth of all products of v2's Stage B. They are multiplied anew each time, so that no patch of theirs is missed.
    """
    mapper: Any = injected.mapper
    inner, inner_bias = mapper.ready(x)
    own_part, mapped_part = weight.split([x.shape[-1], inner.shape[0]], dim=1)
    weight = torch.cat([own_part, mapped_part @ inner[:, :, 0, 0]], dim=1)
    x = torch.cat([x, injected.latents.to(x.dtype).permute(0, 2, 3, 1)], dim=-1)
    return x, weight, bias + mapped_part @ inner_bias


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
