"""Prompts, weighted mixes of prompts, and the checks before any work."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ..checkpoints import PARTS_OF
from ..demo.vocabulary import unknown_words_note
from ..diffusion.samplers import Seed
from .settings import check_count
from .stages import Components

logger = logging.getLogger(__name__)

Prompt = str | Mapping[str, float]  # a text, or texts with their weights: {"a cat": 2, "a dog": 1}


@torch.inference_mode()
def encode_prompt(model: Components, prompt: Prompt) -> tuple[Tensor, Tensor]:
    """Returns text states [1, 77 n, c] of a prompt, or of the average of a mix, for the prior and for the decoder."""
    prior = prompt_states(model, prompt, "prior_text_encoder")
    if model.prior_text_encoder is model.decoder_text_encoder:
        return prior, prior
    return prior, prompt_states(model, prompt, "decoder_text_encoder")


def prompt_states(model: Components, prompt: Prompt, encoder: str) -> Tensor:
    """Returns text states [1, 77 n, c] of a prompt or a mix, by one text encoder."""
    weights = _weights(prompt)
    states = [model.require(encoder).encode([text]) for text in weights]
    if len({x.shape for x in states}) > 1:
        raise ValueError("the prompts of a mix differ in length: use at most 75 tokens (about 50 words) in each")
    total = sum(weights.values())
    first, *others = (x * (weight / total) for x, weight in zip(states, weights.values(), strict=True))
    return sum(others, first)


def check_request(
    model: Components, prompts: Sequence[Prompt], count: int, seed: Seed, *, with_pictures: bool = False
) -> None:
    """Raises ValueError if the pictures cannot be generated, and warns of unknown words."""
    check_count(count, seed)
    for name in PARTS_OF[model.version]:
        if with_pictures or name != "image_encoder":
            model.require(name)
    warn_of_unknown_words(model, prompts)


def warn_of_unknown_words(model: Components, prompts: Iterable[Prompt]) -> None:
    """Logs the words of the prompts that the model does not know, each once."""
    texts = [text for prompt in prompts for text in _weights(prompt)]
    if note := unknown_words_note(texts, model.metadata, model.reported_words, model.source):
        logger.warning(note)


def _weights(prompt: Prompt) -> dict[str, float]:
    """Returns the texts of a prompt and their weights."""
    weights = {prompt: 1.0} if isinstance(prompt, str) else dict(prompt)
    if not weights or not all(0 < weight < math.inf for weight in weights.values()):
        raise ValueError('each prompt of a mix needs a weight above 0, such as {"a cat": 2, "a dog": 1}')
    return weights
