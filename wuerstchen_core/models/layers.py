"""Blocks that the networks share: one implementation of each, named as in the released weights.

Tensors are NCHW; in memory they are channels-last, so that every permute below is a view.
Layers come from a namespace (`operations`, default `torch.nn`), which lets ComfyUI cast and offload them.
"""

from __future__ import annotations

import math
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)

EPS = 1e-6  # of every LayerNorm in Würstchen
TIME_SCALE = 10_000  # radians that the quickest frequency of a time embedding turns from t = 0 to 1


def channels_last(x: Tensor) -> Tensor:
    """Put an NCHW tensor into channels-last memory order (nothing to do if it is already)."""
    return x.contiguous(memory_format=torch.channels_last)


def time_frequencies(dim: int, device: Any = None) -> Tensor:
    """The frequencies [dim // 2] of a time embedding, from 1 to 1 / TIME_SCALE; fp32."""
    half = dim // 2
    step = math.log(TIME_SCALE) / (half - 1)
    return torch.arange(half, device=device, dtype=torch.float32).mul(-step).exp()


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

    def forward(self, x: Tensor) -> Tensor:
        gamma, beta = self.affine(x)
        if x.dtype == torch.float16:  # squares leave fp16's range: they are summed in fp32, and never held
            energy = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=torch.float32)
        else:
            # The plain sum of squares is several times faster than a vector norm on a CPU; the tiny term keeps the
            # gradient finite where a channel is zero everywhere.
            energy = (x.square().sum(dim=(1, 2), keepdim=True) + 1e-12).sqrt()
        response = (energy / (energy.mean(dim=-1, keepdim=True) + EPS)).to(x.dtype)
        return torch.addcmul(beta, x, gamma * response + 1)


def own(operations: Any, layer: type[M]) -> type[M]:
    """The namespace's own version of one of our layers, if it has one: without bare parameters, or casting them."""
    return getattr(operations, layer.__name__, layer)


def channelwise_mlp(c_in: int, c: int, dropout: float, operations: Any, **factory: Any) -> nn.Sequential:
    """Pointwise MLP with global response normalisation; dropout keeps its slot, since keys depend on it."""
    return nn.Sequential(
        operations.Linear(c_in, c * 4, **factory),
        nn.GELU(),
        own(operations, GlobalResponseNorm)(c * 4, **factory),
        nn.Dropout(dropout),
        operations.Linear(c * 4, c, **factory),
    )


class ResBlock(nn.Module):
    """ConvNeXt block; `skip` channels join after the depthwise convolution."""

    def __init__(
        self, c: int, c_skip: int = 0, kernel_size: int = 3, dropout: float = 0.0, operations: Any = nn, **factory: Any
    ):
        super().__init__()
        self.depthwise = operations.Conv2d(c, c, kernel_size=kernel_size, padding=kernel_size // 2, groups=c, **factory)
        self.norm = ChannelNorm()
        self.channelwise = channelwise_mlp(c + c_skip, c, dropout, operations, **factory)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        h = self.norm(self.depthwise(x))
        if skip is not None:
            h = torch.cat([h, skip], dim=1)
        return x + self.channelwise(h.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class EarlySkipResBlock(ResBlock):
    """v1's ConvNeXt block: `skip` channels join before the depthwise convolution, whose groups they fill."""

    def __init__(
        self, c: int, c_skip: int = 0, kernel_size: int = 3, dropout: float = 0.0, operations: Any = nn, **factory: Any
    ):
        super().__init__(c, 0, kernel_size, dropout, operations, **factory)
        self.depthwise = operations.Conv2d(
            c + c_skip, c, kernel_size=kernel_size, padding=kernel_size // 2, groups=c, **factory
        )

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        h = x if skip is None else torch.cat([x, skip], dim=1)
        return x + self.channelwise(self.norm(self.depthwise(h)).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class FeedForwardBlock(nn.Module):
    """The pointwise half of a ResBlock."""

    def __init__(self, c: int, dropout: float = 0.0, operations: Any = nn, **factory: Any):
        super().__init__()
        self.norm = ChannelNorm()
        self.channelwise = channelwise_mlp(c, c, dropout, operations, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.channelwise(self.norm(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class TimestepBlock(nn.Module):
    """Scale and shift by the time embedding."""

    def __init__(self, c: int, c_timestep: int, operations: Any = nn, **factory: Any):
        super().__init__()
        self.mapper = operations.Linear(c_timestep, c * 2, **factory)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        scale, shift = self.mapper(t)[:, :, None, None].chunk(2, dim=1)
        return torch.addcmul(shift, x, 1 + scale)


def attend(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """softmax(q k^T / sqrt(c)) v over [B, heads, tokens, c].

    For training on a CPU the plain products are used: with a backward pass, in bf16, they take a third of the time of
    torch's fused attention (measured at 64 and 36 queries).
    """
    if q.device.type == "cpu" and q.requires_grad:
        weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(dim=-1)
        return F.dropout(weights, dropout) @ v
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)


def multi_head(q: Tensor, k: Tensor, v: Tensor, nhead: int, dropout: float) -> Tensor:
    """Attend from q [B, N, c] to k and v [B, M, c] in `nhead` heads; [B, N, c]."""
    q, k, v = (y.unflatten(-1, (nhead, -1)).transpose(1, 2) for y in (q, k, v))  # [B, heads, tokens, c / heads]
    return attend(q, k, v, dropout).transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """Multi-head attention with diffusers' parameter names, which LoRA files address."""

    def __init__(self, c: int, nhead: int, dropout: float = 0.0, operations: Any = nn, **factory: Any):
        super().__init__()
        self.nhead = nhead
        self.dropout = dropout
        self.to_q = operations.Linear(c, c, **factory)
        self.to_k = operations.Linear(c, c, **factory)
        self.to_v = operations.Linear(c, c, **factory)
        self.to_out = nn.ModuleList([operations.Linear(c, c, **factory)])

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Attend from x [B, N, c] to context [B, M, c]."""
        dropout = self.dropout if self.training else 0.0
        out = multi_head(self.to_q(x), self.to_k(context), self.to_v(context), self.nhead, dropout)
        return self.to_out[0](out)


class Projections(nn.Module):
    """The weights of `nn.MultiheadAttention`, under its names: query, key and value in one matrix."""

    def __init__(self, c: int, operations: Any = nn, **factory: Any):
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.zeros(3 * c, c, **factory))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * c, **factory))
        self.out_proj = operations.Linear(c, c, **factory)


class PackedAttention(nn.Module):
    """Multi-head attention with the original's parameter names."""

    def __init__(self, c: int, nhead: int, dropout: float = 0.0, operations: Any = nn, **factory: Any):
        super().__init__()
        self.nhead = nhead
        self.dropout = dropout
        self.attn = Projections(c, operations, **factory)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Attend from x [B, N, c] to context [B, M, c]."""
        c = x.shape[-1]
        weight, bias = self.attn.in_proj_weight.to(x.dtype), self.attn.in_proj_bias.to(x.dtype)  # fp32 under autocast
        q = F.linear(x, weight[:c], bias[:c])
        k, v = F.linear(context, weight[c:], bias[c:]).chunk(2, dim=-1)
        return self.attn.out_proj(multi_head(q, k, v, self.nhead, self.dropout if self.training else 0.0))


class AttnBlock(nn.Module):
    """Joint self- and cross-attention: image tokens attend to [image tokens, conditioning tokens]."""

    def __init__(
        self,
        c: int,
        c_cond: int,
        nhead: int,
        self_attn: bool = True,
        dropout: float = 0.0,
        packed: bool = False,
        operations: Any = nn,
        **factory: Any,
    ):
        super().__init__()
        self.self_attn = self_attn
        self.norm = ChannelNorm()
        attention = own(operations, PackedAttention) if packed else Attention
        self.attention = attention(c, nhead, dropout, operations, **factory)
        self.kv_mapper = nn.Sequential(nn.SiLU(), operations.Linear(c_cond, c, **factory))

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        """Add to x [B, c, H, W] what it reads from cond [B, M, c_cond]."""
        tokens = self.norm(x).permute(0, 2, 3, 1).flatten(1, 2)
        context = self.kv_mapper(cond)
        if self.self_attn:
            context = torch.cat([tokens, context], dim=1)
        out = self.attention(tokens, context)
        return x + out.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)


def nearest_codes(rows: Tensor, codebook: Tensor, chunk: int = 16384) -> Tensor:
    """Index of the codebook row [K, c] nearest to each of rows [N, c]; in chunks, so N x K is never held whole."""
    return torch.cat([torch.cdist(part, codebook).argmin(dim=1) for part in rows.split(chunk)])


def xavier_init(module: nn.Module) -> None:
    """The original's general initialisation: Xavier-uniform weights, zero biases (use with `Module.apply`)."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, Projections):
        nn.init.xavier_uniform_(module.in_proj_weight)
        nn.init.zeros_(module.in_proj_bias)
    elif isinstance(module, Attention):  # the original's are one matrix [3c, c], whose Xavier bound is smaller
        for layer in (module.to_q, module.to_k, module.to_v):
            nn.init.xavier_uniform_(layer.weight, gain=math.sqrt(0.5))


@torch.no_grad()
def init_blocks(blocks: nn.Module, depth: int) -> None:
    """The original's initialisation of residual branches (shrunk by sqrt(1 / depth)) and time mappers (zero)."""
    for block in blocks.modules():
        if isinstance(block, ResBlock | FeedForwardBlock):
            block.channelwise[-1].get_parameter("weight").mul_(math.sqrt(1 / depth))
        elif isinstance(block, TimestepBlock):
            nn.init.zeros_(block.mapper.weight)
