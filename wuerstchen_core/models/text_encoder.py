"""CLIP's text tower (arXiv 2103.00020); Würstchen conditions on its 77 last hidden states after the final norm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..common.dataclass_config import option
from .attention import PackedProjections
from .operations import Operations, from_namespace
from .tokenizer import END, START, encode


@dataclass(frozen=True)
class TextEncoderParams:
    """Sizes of a text tower."""

    width: int = option(meaning="width of the states")
    heads: int = option(meaning="attention heads")
    layers: int = option(meaning="transformer blocks")
    vocab_size: int = option(49408, "number of tokens")
    context_length: int = option(77, "tokens in a text")
    mlp_ratio: float = option(4.0, "width of the MLPs, as a multiple of the states'")


CLIP_H = TextEncoderParams(width=1024, heads=16, layers=24)
CLIP_BIGG = TextEncoderParams(width=1280, heads=20, layers=32)


class SelfAttention(PackedProjections):
    """Multi-head self-attention with the parameter names of `nn.MultiheadAttention`."""

    def __init__(self, c: int, heads: int, operations: Any = Operations, **factory: Any):
        super().__init__(c, operations, **factory)
        self.heads = heads

    def queries_keys_values(self, x: Tensor) -> tuple[Tensor, ...]:
        """Returns the three projections [B, L, c] of x [B, L, c]."""
        return self.project(x).chunk(3, dim=-1)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Attends within x [B, L, c]; the mask [B, 1, L, L] is True where a token (third axis) sees another."""
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.queries_keys_values(x))
        return self.out_proj(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))


class TransformerBlock(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, params: TextEncoderParams, operations: Any, **factory: Any):
        super().__init__()
        width, norm = params.width, from_namespace(operations, nn.LayerNorm)
        hidden = int(width * params.mlp_ratio)
        self.ln_1 = norm(width, **factory)
        self.attn = SelfAttention(width, params.heads, operations, **factory)
        self.ln_2 = norm(width, **factory)
        self.mlp = nn.Sequential()
        self.mlp.c_fc = operations.Linear(width, hidden, **factory)
        self.mlp.gelu = nn.GELU()
        self.mlp.c_proj = operations.Linear(hidden, width, **factory)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Maps x [B, L, c]; the mask is that of `SelfAttention`."""
        x = x + self.attn(self.ln_1(x), mask)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """The blocks, under open_clip's name."""

    def __init__(self, params: TextEncoderParams, operations: Any, **factory: Any):
        super().__init__()
        blocks = (TransformerBlock(params, operations, **factory) for _ in range(params.layers))
        self.resblocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Maps x [B, L, c]; the mask is that of `SelfAttention`."""
        for block in self.resblocks:
            x = block(x, mask)
        return x


class TextEncoder(nn.Module):
    """CLIP's text transformer with a causal and a padding mask, and open_clip's parameter names."""

    def __init__(
        self, params: TextEncoderParams, *, operations: Any = Operations, device: Any = None, dtype: Any = None
    ):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.params = params
        self.token_embedding = operations.Embedding(params.vocab_size, params.width, **factory)
        self.positional_embedding = nn.Parameter(torch.zeros(params.context_length, params.width, **factory))
        self.transformer = Transformer(params, operations, **factory)
        self.ln_final = from_namespace(operations, nn.LayerNorm)(params.width, **factory)

    def init_weights(self) -> None:
        """Initialises the weights as CLIP does before training."""
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        width, layers = self.params.width, self.params.layers
        for block in list[Any](self.transformer.resblocks):
            nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=width**-0.5 * (2 * layers) ** -0.5)
            nn.init.zeros_(block.attn.out_proj.bias)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=width**-0.5 * (2 * layers) ** -0.5)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Returns states [B, L, width] of token ids [B, L]; the mask [B, L] is False for padding."""
        return self.encode_vectors(self.token_embedding(ids), mask)

    def encode_vectors(self, x: Tensor, mask: Tensor) -> Tensor:
        """Returns states [B, L, width] of the vectors [B, L, width] of tokens, or of a textual inversion."""
        length = x.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
        x = self.transformer(x + self.positional_embedding[:length], mask.bool()[:, None, None, :] & causal)
        return self.ln_final(x)

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Returns states [B, 77 n, width] of prompts of any length: n chunks of 75 tokens, each encoded separately.

        Raises ValueError if the prompts differ in n.
        """
        ids, mask = zip(*(tokenize_whole(prompt, self.params.context_length) for prompt in prompts), strict=True)
        if len(counts := {len(chunks) for chunks in ids}) > 1:
            raise ValueError(f"prompts with {counts} chunks of 75 tokens do not fit together: encode them one by one")
        device = self.token_embedding.weight.device
        states = self(torch.cat(ids).to(device), torch.cat(mask).to(device))
        return states.unflatten(0, (len(prompts), -1)).flatten(1, 2)


def tokenize(prompts: Sequence[str], context_length: int = 77) -> tuple[Tensor, Tensor]:
    """Returns token ids [B, 77] of prompts, truncated or padded with <|endoftext|>, and the mask (False: padding)."""
    return pad_tokens([encode(prompt)[: context_length - 2] for prompt in prompts], context_length)


def tokenize_whole(prompt: str, context_length: int = 77) -> tuple[Tensor, Tensor]:
    """Returns ids and mask [n, 77] of a prompt of any length, in n chunks of 75 tokens.

    Like ComfyUI, it splits after 75 tokens even inside a word.
    """
    tokens, size = encode(prompt), context_length - 2
    return pad_tokens([tokens[i : i + size] for i in range(0, max(len(tokens), 1), size)], context_length)


def pad_tokens(texts: Sequence[Sequence[int]], context_length: int = 77) -> tuple[Tensor, Tensor]:
    """Returns ids and mask [n, L]; as in ComfyUI, the mask ends at the first END, even at one in the text."""
    rows = [[START, *tokens] + [END] * (context_length - 1 - len(tokens)) for tokens in texts]
    ids, ends = torch.tensor(rows), torch.tensor([row.index(END) for row in rows])
    return ids, torch.arange(context_length) <= ends[:, None]
