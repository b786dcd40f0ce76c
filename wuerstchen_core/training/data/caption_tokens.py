"""Tokens of captions: read whole, in chunks of 75 as in generation, or cut after the first chunk."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ...models.text_encoder import tokenize_whole

log = logging.getLogger(__name__)

Tokens = tuple[Tensor, Tensor]  # ids and mask [n, 77] of a caption
WHOLE, CUT = "whole", "cut"  # choices for captions longer than a chunk


class CaptionTokenizer:
    """Tokenizes captions, and counts those longer than a chunk; logs the 1st, 10th, 100th ... of them."""

    def __init__(self, cut: bool = False):
        self.cut = cut
        self.long = 0

    def __call__(self, captions: Sequence[str]) -> list[Tokens]:
        """Returns the tokens of each caption, n = 1 if captions are cut, and counts the long ones."""
        tokens = [self.tokens(caption) for caption in captions]
        before, self.long = self.long, self.long + sum(len(ids) > 1 for ids, _ in tokens)
        if self.long and (not before or int(math.log10(self.long)) > int(math.log10(before))):
            log.info("%s", self.note())
        return self._shortened(tokens)

    def uncounted(self, captions: Sequence[str]) -> list[Tokens]:
        """Returns the tokens of each caption without counting them."""
        return self._shortened([self.tokens(caption) for caption in captions])

    def prompt(self, caption: str) -> str:
        """Returns the text whose tokens are read for a caption."""
        return caption

    def tokens(self, caption: str) -> Tokens:
        """Returns the tokens of a caption of any length."""
        return tokenize_whole(caption)

    def note(self) -> str:
        """Returns how many captions were longer than a chunk, and what is done with them."""
        done = "cut there" if self.cut else "read whole, in pieces of 75 as in generation"
        return f"{self.long} captions read so far have more than 75 tokens: they are {done}"

    def _shortened(self, tokens: list[Tokens]) -> list[Tokens]:
        return [(ids[:1], mask[:1]) for ids, mask in tokens] if self.cut else tokens


def pad_states(states: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Returns sequences [L, c] as one tensor [B, max L, c], and its mask [B, max L], False for padding.

    The mask is None if all have one length.
    """
    lengths = torch.tensor([len(x) for x in states])
    if lengths.unique().numel() == 1:
        return torch.stack(list(states)), None
    return pad_sequence(list(states), batch_first=True), torch.arange(int(lengths.max())) < lengths[:, None]
