"""Multi-head attention: image tokens attend to themselves and to the conditioning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.attention import attention
from ..kernels.linear import linear
from .layers import ChannelNorm
from .operations import Operations, from_namespace


class KeysValues(NamedTuple):
    """Keys and values [B, M, c] of a sequence."""

    keys: Tensor
    values: Tensor


class MultiHeadAttention(nn.Module):
    """Attention from tokens to keys and values; subclasses have the projections."""

    query: Callable[[Tensor], Tensor]  # [B, N, c] to [B, N, c]
    keys_values: Callable[[Tensor], KeysValues]
    out: Callable[[Tensor], Tensor]

    def __init__(self, nhead: int, dropout: float):
        super().__init__()
        self.nhead = nhead
        self.dropout = dropout

    def forward(self, x: Tensor, *context: KeysValues, mask: Tensor | None = None) -> Tensor:
        """Attends from x [B, N, c] to all sequences of the context, except where `mask` [B, M] is False."""
        keys, values = (torch.cat(parts, dim=1) if len(parts) > 1 else parts[0] for parts in zip(*context, strict=True))
        # [B, N or M, c] to [B, nhead, N or M, c / nhead]
        q, k, v = (y.unflatten(-1, (self.nhead, -1)).transpose(1, 2) for y in (self.query(x), keys, values))
        dropout = self.dropout if self.training else 0.0
        return self.out(attention(q, k, v, dropout, mask).transpose(1, 2).flatten(2))


class Attention(MultiHeadAttention):
    """Multi-head attention with diffusers' parameter names, which LoRA files use."""

    def __init__(self, c: int, nhead: int, dropout: float = 0.0, operations: Any = Operations, **factory: Any):
        super().__init__(nhead, dropout)
        self.to_q, self.to_k, self.to_v = (operations.Linear(c, c, **factory) for _ in range(3))
        self.to_out = nn.ModuleList([operations.Linear(c, c, **factory)])

    def query(self, x: Tensor) -> Tensor:
        return self.to_q(x)

    def keys_values(self, x: Tensor) -> KeysValues:
        return KeysValues(self.to_k(x), self.to_v(x))

    def out(self, x: Tensor) -> Tensor:
        return self.to_out[0](x)


class PackedProjections(nn.Module):
    """Weights named as in `nn.MultiheadAttention`, with query, key and value in one matrix."""

    def __init__(self, c: int, operations: Any = Operations, **factory: Any):
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.zeros(3 * c, c, **factory))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * c, **factory))
        self.out_proj = operations.Linear(c, c, **factory)

    def project(self, x: Tensor, rows: slice = slice(None)) -> Tensor:
        """Returns the product of x [B, N, c] with rows of the matrix, whose thirds are query, key and value."""
        weight, bias = self.in_proj_weight.to(x.dtype), self.in_proj_bias.to(x.dtype)  # fp32 under autocast
        return linear(x, weight[rows], bias[rows])


class PackedAttention(MultiHeadAttention):
    """Multi-head attention with the original's parameter names."""

    def __init__(self, c: int, nhead: int, dropout: float = 0.0, operations: Any = Operations, **factory: Any):
        super().__init__(nhead, dropout)
        self.attn = PackedProjections(c, operations, **factory)

    def query(self, x: Tensor) -> Tensor:
        return self.attn.project(x, slice(None, x.shape[-1]))

    def keys_values(self, x: Tensor) -> KeysValues:
        return KeysValues(*self.attn.project(x, slice(x.shape[-1], None)).chunk(2, dim=-1))

    def out(self, x: Tensor) -> Tensor:
        return self.attn.out_proj(x)

    def split(self) -> Attention:
        """Returns the same attention with separate projections, frozen."""
        weight, bias = self.attn.in_proj_weight, self.attn.in_proj_bias
        with torch.device("meta"):
            out = Attention(weight.shape[1], self.nhead, self.dropout, dtype=weight.dtype)
        for layer, part, offset in zip((out.to_q, out.to_k, out.to_v), weight.chunk(3), bias.chunk(3), strict=True):
            layer.load_state_dict({"weight": part, "bias": offset}, assign=True)
        out.to_out[0] = self.attn.out_proj
        return out.requires_grad_(False).train(self.training)


def split_projections(network: nn.Module) -> None:
    """Replaces the attention of a network with packed projections by `Attention`, on the meta device too."""
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, PackedAttention):
                setattr(module, name, child.split())


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
        operations: Any = Operations,
        **factory: Any,
    ):
        super().__init__()
        self.self_attn = self_attn
        self.norm = ChannelNorm()
        kind = from_namespace(operations, PackedAttention) if packed else Attention
        self.attention = kind(c, nhead, dropout, operations, **factory)
        self.kv_mapper = nn.Sequential(nn.SiLU(), operations.Linear(c_cond, c, **factory))

    def keys_values(self, cond: Tensor) -> KeysValues:
        """Returns the keys and values of cond [B, M, c_cond], which do not depend on the time."""
        return self.attention.keys_values(self.kv_mapper(cond))

    def forward(self, x: Tensor, cond: Tensor | KeysValues, mask: Tensor | None = None) -> Tensor:
        """Adds to x [B, c, H, W] its attention to itself and to cond [B, M, c_cond], or to cond's keys and values.

        `mask` [B, M] is False where cond is padding; cond must be a tensor then.
        """
        tokens = self.norm(x).permute(0, 2, 3, 1).flatten(1, 2)  # [B, H W, c]
        if isinstance(cond, KeysValues):
            out = self.attention(tokens, *([self.attention.keys_values(tokens)] if self.self_attn else []), cond)
        else:  # one projection for both: using a weight twice would add up two gradients in training
            mapped: Tensor = self.kv_mapper(cond)
            context = torch.cat([tokens, mapped.to(tokens.dtype)], dim=1) if self.self_attn else mapped
            if mask is not None:
                mask = F.pad(mask, (context.shape[1] - mask.shape[1], 0), value=True)
            out = self.attention(tokens, self.attention.keys_values(context), mask=mask)
        return x + out.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)
