"""CLIP's text tower (arXiv 2103.00020); Würstchen conditions on its 77 last hidden states after the final norm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .operations import Embedding
from .tokenizer import END, START, encode


@dataclass(frozen=True)
class TextEncoderParams:
    """Sizes of a text tower."""

    width: int
    heads: int
    layers: int
    vocab_size: int = 49408
    context_length: int = 77
    mlp_ratio: float = 4.0


CLIP_H = TextEncoderParams(width=1024, heads=16, layers=24)
CLIP_BIGG = TextEncoderParams(width=1280, heads=20, layers=32)


class TextEncoder(nn.Module):
    """open_clip's text transformer with a causal and a padding mask."""

    def __init__(self, params: TextEncoderParams, *, device: Any = None, dtype: Any = None):
        from open_clip.transformer import Transformer  # takes seconds to import

        super().__init__()
        self.params = params
        self.token_embedding = Embedding(params.vocab_size, params.width)
        self.positional_embedding = nn.Parameter(torch.zeros(params.context_length, params.width))
        self.transformer = Transformer(params.width, params.layers, params.heads, params.mlp_ratio)
        self.ln_final = nn.LayerNorm(params.width)
        self.to(device=device, dtype=dtype)

    def init_weights(self) -> None:
        """Initialises the weights as CLIP does before training."""
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        width, layers = self.params.width, self.params.layers
        for block in self.transformer.resblocks:
            nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=width**-0.5 * (2 * layers) ** -0.5)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=width**-0.5 * (2 * layers) ** -0.5)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Returns states [B, L, width] of token ids [B, L]; the mask [B, L] is False for padding."""
        return self.encode_vectors(self.token_embedding(ids), mask)

    def encode_vectors(self, x: Tensor, mask: Tensor) -> Tensor:
        """Returns states [B, L, width] of the vectors [B, L, width] of tokens, or of a textual inversion."""
        length = x.shape[1]
        x = x + self.positional_embedding[:length]
        causal = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
        allowed = mask.bool()[:, None, :] & causal  # [B, L, L]
        blocked = torch.zeros_like(allowed, dtype=x.dtype).masked_fill(~allowed, torch.finfo(x.dtype).min)
        blocked = blocked.repeat_interleave(self.params.heads, dim=0)
        if getattr(self.transformer, "batch_first", False):
            x = self.transformer(x, attn_mask=blocked)
        else:  # open_clip before 2.25
            x = self.transformer(x.transpose(0, 1), attn_mask=blocked).transpose(0, 1)
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
    return _pad([encode(prompt)[: context_length - 2] for prompt in prompts], context_length)


def tokenize_whole(prompt: str, context_length: int = 77) -> tuple[Tensor, Tensor]:
    """Returns ids and mask [n, 77] of a prompt of any length, in n chunks of 75 tokens.

    Like ComfyUI, it splits after 75 tokens even inside a word.
    """
    tokens, size = encode(prompt), context_length - 2
    return _pad([tokens[i : i + size] for i in range(0, max(len(tokens), 1), size)], context_length)


def _pad(texts: Sequence[Sequence[int]], context_length: int) -> tuple[Tensor, Tensor]:
    """Returns ids and mask [n, L]; as in ComfyUI, the mask ends at the first END, even at one in the text."""
    rows = [[START, *tokens] + [END] * (context_length - 1 - len(tokens)) for tokens in texts]
    ids, ends = torch.tensor(rows), torch.tensor([row.index(END) for row in rows])
    return ids, torch.arange(context_length) <= ends[:, None]
