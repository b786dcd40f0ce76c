"""Attention on a CPU, in chunks that fit its cache."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import inference_on_cpu, training_on_cpu
from .dropout import Dropout, supports_rate
from .linear import refuse_second_order

INFERENCE_SCORES = 2**20  # attention scores per chunk and thread, which fit its cache
TRAINING_SCORES = 2**19  # attention scores per chunk


def attention(q: Tensor, k: Tensor, v: Tensor, dropout: float, mask: Tensor | None = None) -> Tensor:
    """Returns softmax(q k^T / sqrt(c)) v over [B, heads, tokens, c], with dropout of the softmax.

    Keys where the mask [B, tokens] is False do not count.
    """
    if mask is not None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None], dropout_p=dropout)
    one_dtype = q.dtype == k.dtype == v.dtype != torch.float16
    if one_dtype and training_on_cpu(q, k, v) and supports_rate(dropout):
        heads = (x.flatten(0, 1).contiguous() for x in (q * q.shape[-1] ** -0.5, k, v))
        out: Tensor = _Attention.apply(Dropout(dropout), *heads)
        return out.view_as(q)
    if q.dtype == torch.bfloat16 and inference_on_cpu(q, k, v) and not dropout and not _has_amx():
        return _chunked_attention(q, k, v)
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)


@cache
def _has_amx() -> bool:
    """True if the processor has tile instructions for bf16, which torch's fused attention uses."""
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)())


def _chunked_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Computes attention with plain matrix products over chunks of heads and queries.

    Without AMX, torch's fused attention multiplies bf16 as slowly as fp32; this takes 40 % of its time.
    """
    (batch, count, queries, width), keys = q.shape, k.shape[-2]
    budget = INFERENCE_SCORES * torch.get_num_threads()
    heads, length = max(1, budget // (queries * keys)), max(64, budget // keys)
    q, k, v = (x.flatten(0, 1).contiguous() for x in (q * width**-0.5, k, v))
    out = torch.empty_like(q)
    for i in range(0, len(out), heads):
        chunk = slice(i, i + heads)
        for part, part_out in zip(q[chunk].split(length, 1), out[chunk].split(length, 1), strict=True):
            torch.bmm(torch.bmm(part, k[chunk].transpose(1, 2)).softmax(dim=-1), v[chunk], out=part_out)
    return out.view(batch, count, queries, width)


class _Attention(torch.autograd.Function):
    """softmax(q k^T) v over [heads, tokens, c], with gradients.

    The backward pass recomputes the scores chunk by chunk in the processor's cache. This is as fast as storing them;
    they would take most of a block's memory. torch's fused attention has no dropout on a CPU; with a backward pass it
    takes three times as long in bf16 at 64 and 36 queries, and 1.3 times at 576.
    """

    @staticmethod
    def forward(ctx: Any, dropout: Dropout, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.dropout = dropout
        ctx.save_for_backward(q, k, v)
        dropout, out = dropout.restarted(), torch.empty_like(q)
        for q_, k_, v_, out_ in _head_chunks(q, k, v, out):
            probs = torch.bmm(q_, k_.transpose(1, 2)).softmax(dim=-1)
            dropout(probs)
            torch.bmm(probs, v_, out=out_)
        return out.mul_(dropout.scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_order()
        inputs, dropout = ctx.saved_tensors, ctx.dropout.restarted()
        grads = [torch.empty_like(x) for x in inputs]
        chunks = _head_chunks(*inputs, (grad * dropout.scale).contiguous(), *grads)
        for q, k, v, grad_out, grad_q, grad_k, grad_v in chunks:
            probs = torch.bmm(q, k.transpose(1, 2)).softmax(dim=-1)
            dropped, grad_probs = probs.clone() if dropout.p else probs, torch.bmm(grad_out, v.transpose(1, 2))
            dropout(dropped, grad_probs)
            torch.bmm(dropped.transpose(1, 2), grad_out, out=grad_v)
            grad_scores = torch._softmax_backward_data(grad_probs, probs, -1, probs.dtype)
            torch.bmm(grad_scores, k, out=grad_q)
            torch.bmm(grad_scores.transpose(1, 2), q, out=grad_k)
        return None, *grads


def _head_chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Splits tensors [heads, tokens, c] into chunks of heads whose scores fit the cache; the first two are q and k."""
    count = max(1, TRAINING_SCORES // (tensors[0].shape[1] * tensors[1].shape[1]))
    return zip(*(x.split(count) for x in tensors), strict=True)
