"""Prompts, mixes of them, and what is checked before anything is painted."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..checkpoints import PARTS_OF
from ..demo.vocabulary import unknown_words_note
from ..diffusion.samplers import Seed
from .settings import Callback, check_count, ignore
from .stages import Stages, need

logger = logging.getLogger(__name__)

Prompt = str | Mapping[str, float]  # a mix of prompts is told by their weights: {"a cat": 2, "a dog": 1}


class Prompts(Stages):
    """What painting from text and from pictures have in common."""

    def __init__(self, **given: Any):
        super().__init__(**given)
        self.source: str | None = None  # the model's name for `inspect`, if it was loaded from one source
        self._reported_words: set[str] = set()

    @torch.inference_mode()
    def encode_prompt(self, prompt: Prompt) -> tuple[Tensor, Tensor]:
        """A prompt, or the average of a mix of prompts, to text states [1, 77 n, c] for the prior and the decoder."""
        prior = self.prompt_states(prompt, "prior_text_encoder")
        if self.prior_text_encoder is self.decoder_text_encoder:
            return prior, prior
        return prior, self.prompt_states(prompt, "decoder_text_encoder")

    def check(self, prompts: Sequence[Prompt], count: int, seed: Seed, *, with_pictures: bool = False) -> None:
        """Raise ValueError where no picture can come of it; words that the model never learned are logged, once."""
        check_count(count, seed)
        for name in PARTS_OF[self.version]:
            if with_pictures or name != "image_encoder":
                need(getattr(self, name), name)
        self.warn_of_unknown_words(prompts)

    def warn_of_unknown_words(self, prompts: Iterable[Prompt]) -> None:
        """Logs the words of the prompts that the model does not know, each once per pipeline."""
        texts = [text for prompt in prompts for text in _weights(prompt)]
        if note := unknown_words_note(texts, self.metadata, self._reported_words, self.source):
            logger.warning(note)

    def texts(
        self, prompt: Prompt, negative: str, count: int, callback: Callback | None
    ) -> tuple[list[Tensor], tuple[Tensor, Tensor]]:
        """Text states of `count` pictures of a prompt, and of what to stay away from."""
        wanted, unwanted = self.encode_prompt(prompt), self.encode_text([negative])
        (callback or ignore)("text", 1, 1, None)
        return [states.expand(count, -1, -1) for states in wanted], unwanted

    def prompt_states(self, prompt: Prompt, tower: str) -> Tensor:
        """As `encode_prompt`, of one tower alone."""
        weights = _weights(prompt)
        states = [self.states(getattr(self, tower), tower, [text]) for text in weights]
        if len({x.shape for x in states}) > 1:
            raise ValueError("the prompts of a mix are of different lengths: let each fit into 75 tokens (50 words)")
        shares = [weight / sum(weights.values()) for weight in weights.values()]
        return sum((x * share for x, share in zip(states[1:], shares[1:], strict=True)), states[0] * shares[0])


def _weights(prompt: Prompt) -> dict[str, float]:
    """The texts of a prompt and their weights."""
    weights = {prompt: 1.0} if isinstance(prompt, str) else dict(prompt)
    if not weights or not all(0 < weight < math.inf for weight in weights.values()):
        raise ValueError('a mix of prompts needs a weight above 0 for each, such as {"a cat": 2, "a dog": 1}')
    return weights
