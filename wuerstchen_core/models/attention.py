"""Attention of the networks: image tokens attend to themselves and to a conditioning."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.dropout import Dropout, can_draw
from ..kernels.linear import Operations, first_order, learning_cpu, plain_cpu, product
from .layers import ChannelNorm
from .mlp import own

LEARNT_SCORES = 2**19  # the same in training
SCORES = 2**20  # of attention that are held at once on a CPU, for each thread: as much as its cache


def attend(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """softmax(q k^T / sqrt(c)) v over [B, heads, tokens, c], with dropout of what is softmax's."""
    alike = q.dtype == k.dtype == v.dtype != torch.float16
    if alike and learning_cpu(q, k, v) and can_draw(dropout):
        heads = (x.flatten(0, 1).contiguous() for x in (q * q.shape[-1] ** -0.5, k, v))
        out: Tensor = _Attention.apply(Dropout(dropout), *heads)
        return out.view_as(q)
    if q.dtype == torch.bfloat16 and plain_cpu(q, k, v) and not dropout and not _has_amx():
        return _in_pieces(q, k, v)
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)


@cache
def _has_amx() -> bool:
    """Whether the processor multiplies bf16 by tiles, as torch's fused attention then does, too."""
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)())


def _in_pieces(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Plain products, so many heads and queries at once as fit the cache.

    Without AMX, torch's fused attention multiplies bf16 as slowly as fp32: this takes 40 % of its time.
    """
    (batch, count, queries, width), keys = q.shape, k.shape[-2]
    budget = SCORES * torch.get_num_threads()
    heads, length = max(1, budget // (queries * keys)), max(64, budget // keys)
    q, k, v = (x.flatten(0, 1).contiguous() for x in (q * width**-0.5, k, v))
    out = torch.empty_like(q)
    for i in range(0, len(out), heads):
        some = slice(i, i + heads)
        for part, into in zip(q[some].split(length, 1), out[some].split(length, 1), strict=True):
            torch.bmm(torch.bmm(part, k[some].transpose(1, 2)).softmax(dim=-1), v[some], out=into)
    return out.view(batch, count, queries, width)


class _Attention(torch.autograd.Function):
    """softmax(q k^T) v over [heads, tokens, c], where gradients are wanted.

    The scores are computed again for them, head by head in the processor's cache, where that takes as long as keeping
    them; and these would be most of what a block keeps. Torch's fused attention has no dropout on a CPU, and with a
    backward pass takes three times as long in bf16 at 64 and 36 queries, and 1.3 times at 576.
    """

    @staticmethod
    def forward(dropout: Dropout, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        dropout, out = dropout.again(), torch.empty_like(q)
        for q_, k_, v_, out_ in _heads(q, k, v, out):
            weights = torch.bmm(q_, k_.transpose(1, 2)).softmax(dim=-1)
            dropout(weights)
            torch.bmm(weights, v_, out=out_)
        return out.mul_(dropout.scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.dropout, *heads = inputs
        ctx.save_for_backward(*heads)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        given, dropout = ctx.saved_tensors, ctx.dropout.again()
        grads = [torch.empty_like(x) for x in given]
        for q, k, v, grad_, *of in _heads(*given, (grad * dropout.scale).contiguous(), *grads):
            weights = torch.bmm(q, k.transpose(1, 2)).softmax(dim=-1)
            used, of_used = weights.clone() if dropout.share else weights, torch.bmm(grad_, v.transpose(1, 2))
            dropout(used, of_used)
            torch.bmm(used.transpose(1, 2), grad_, out=of[2])
            of_scores = torch._softmax_backward_data(of_used, weights, -1, weights.dtype)
            torch.bmm(of_scores, k, out=of[0])
            torch.bmm(of_scores.transpose(1, 2), q, out=of[1])
        return None, *grads


def _heads(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """So many heads [heads, tokens, c] of queries, keys and other tensors at a time as fit a cache."""
    count = max(1, LEARNT_SCORES // (tensors[0].shape[1] * tensors[1].shape[1]))
    return zip(*(x.split(count) for x in tensors), strict=True)


class Read(NamedTuple):
    """What attention knows of a conditioning [B, M, c_cond]: its keys and values [B, M, c]."""

    keys: Tensor
    values: Tensor


class MultiHeadAttention(nn.Module):
    """From tokens to what was read, and to themselves; how the weights are kept is the subclass's."""

    def __init__(self, nhead: int, dropout: float):
        super().__init__()
        self.nhead = nhead
        self.dropout = dropout

    def query(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def read(self, x: Tensor) -> Read:
        raise NotImplementedError

    def out(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor, *known: Read) -> Tensor:
        """Attend from x [B, N, c] to all that is known."""
        keys, values = (torch.cat(parts, dim=1) if len(parts) > 1 else parts[0] for parts in zip(*known, strict=True))
        q, k, v = (y.unflatten(-1, (self.nhead, -1)).transpose(1, 2) for y in (self.query(x), keys, values))
        return self.out(attend(q, k, v, self.dropout if self.training else 0.0).transpose(1, 2).flatten(2))


class Attention(MultiHeadAttention):
    """Multi-head attention with diffusers' parameter names, which LoRA files address."""

    def __init__(self, c: int, nhead: int, dropout: float = 0.0, operations: Any = Operations, **factory: Any):
        super().__init__(nhead, dropout)
        self.to_q = operations.Linear(c, c, **factory)
        self.to_k = operations.Linear(c, c, **factory)
        self.to_v = operations.Linear(c, c, **factory)
        self.to_out = nn.ModuleList([operations.Linear(c, c, **factory)])

    def query(self, x: Tensor) -> Tensor:
        return self.to_q(x)

    def read(self, x: Tensor) -> Read:
        return Read(self.to_k(x), self.to_v(x))

    def out(self, x: Tensor) -> Tensor:
        return self.to_out[0](x)


class Projections(nn.Module):
    """The weights of `nn.MultiheadAttention`, under its names: query, key and value in one matrix."""

    def __init__(self, c: int, operations: Any = Operations, **factory: Any):
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.zeros(3 * c, c, **factory))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * c, **factory))
        self.out_proj = operations.Linear(c, c, **factory)


class PackedAttention(MultiHeadAttention):
    """Multi-head attention with the original's parameter names."""

    def __init__(self, c: int, nhead: int, dropout: float = 0.0, operations: Any = Operations, **factory: Any):
        super().__init__(nhead, dropout)
        self.attn = Projections(c, operations, **factory)

    def _weights(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.attn.in_proj_weight.to(x.dtype), self.attn.in_proj_bias.to(x.dtype)  # fp32 under autocast

    def query(self, x: Tensor) -> Tensor:
        weight, bias = self._weights(x)
        c = x.shape[-1]
        return product(x, weight[:c], bias[:c])

    def read(self, x: Tensor) -> Read:
        weight, bias = self._weights(x)
        c = x.shape[-1]
        return Read(*product(x, weight[c:], bias[c:]).chunk(2, dim=-1))

    def out(self, x: Tensor) -> Tensor:
        return self.attn.out_proj(x)


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
        attention = own(operations, PackedAttention) if packed else Attention
        self.attention = attention(c, nhead, dropout, operations, **factory)
        self.kv_mapper = nn.Sequential(nn.SiLU(), operations.Linear(c_cond, c, **factory))

    def read(self, cond: Tensor) -> Read:
        """What the block knows of cond [B, M, c_cond], at whatever time."""
        return self.attention.read(self.kv_mapper(cond))

    def forward(self, x: Tensor, cond: Tensor | Read) -> Tensor:
        """Add to x [B, c, H, W] what it reads from cond [B, M, c_cond], or has read of it."""
        tokens = self.norm(x).permute(0, 2, 3, 1).flatten(1, 2)
        if isinstance(cond, Read):
            out = self.attention(tokens, *([self.attention.read(tokens)] if self.self_attn else []), cond)
        else:  # both at once: in training, a weight that is used twice has two gradients to be added
            mapped: Tensor = self.kv_mapper(cond)
            both = torch.cat([tokens, mapped.to(tokens.dtype)], dim=1) if self.self_attn else mapped
            out = self.attention(tokens, self.attention.read(both))
        return x + out.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)
