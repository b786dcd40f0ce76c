"""A text tower that learns with the prior that it reads for, as a part of it."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..models.prior import Prior
from ..models.text_encoder import TextEncoder

TOWER = "text_encoder"  # what it is called in the prior


class SeparateAttention(nn.Module):
    """An `nn.MultiheadAttention` with a layer for each of its projections, as transformers has them.

    Adapters need layers that are called; that one only takes their weights. peft can put them there nonetheless, but
    adds them to the weights and takes them off again at each step, whose rounding the frozen weights keep.
    """

    def __init__(self, packed: nn.MultiheadAttention):
        super().__init__()
        self.heads = packed.num_heads
        thirds = zip(packed.in_proj_weight.chunk(3), packed.in_proj_bias.chunk(3), strict=True)
        self.q_proj, self.k_proj, self.v_proj = (_linear(weight, bias) for weight, bias in thirds)
        self.out_proj = packed.out_proj

    def forward(self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor, need_weights: bool) -> tuple[Tensor, None]:
        """Attend from q [B, N, c] to k and v [B, M, c], with a mask [B * heads, N, M] that is added to the scores."""
        given = (self.q_proj(q), self.k_proj(k), self.v_proj(v))
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in given)
        mask = attn_mask.unflatten(0, (len(q), -1)).to(q.dtype)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out_proj(out.transpose(1, 2).flatten(2)), None


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    """A layer with these weights, which aren't copied."""
    out, width = weight.shape
    layer = nn.Linear(width, out, device="meta")
    layer.weight, layer.bias = (nn.Parameter(x.detach(), x.requires_grad) for x in (weight, bias))
    return layer


def let_read(prior: Prior, tower: TextEncoder) -> None:
    """Make a tower a part of a prior, which then takes tokens [2, B, L] (ids and mask) in place of text states, too."""
    for block in tower.transformer.resblocks:
        block.attn = SeparateAttention(block.attn)
    prior.add_module(TOWER, tower)
    prior.register_forward_pre_hook(_read)


def _read(prior: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
    latents, t, text = given
    if isinstance(text, Tensor) and not text.is_floating_point():
        text = prior.get_submodule(TOWER)(*text)
    return latents, t, text
