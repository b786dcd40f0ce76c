"""Encodes prompts and weighted mixes of prompts, and checks arguments before any computation."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ..checkpoints import PARTS_OF
from ..checkpoints.components import TOWERS
from ..common.numbers import check_finite, to_float
from ..common.values import to_list
from ..demo.vocabulary import unknown_words_note
from ..diffusion.samplers import Seed
from .components import Components
from .embeddings import NAMES, check_embeddings, encode_with_embeddings, has_embedding
from .settings import SamplingSettings, check_count

logger = logging.getLogger(__name__)

_WEIGHT = re.compile(r"\([^()]+:\s*\d*\.?\d+\s*\)")

Prompt = str | Mapping[str, float]  # a text, or texts with their weights: {"a cat": 2, "a dog": 1}


@torch.inference_mode()
def encode_text(model: Components, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Returns the text states [B, 77 n, c] of texts, for Stage C and for Stage B.

    n is the number of 75-token pieces of a text. Raises ValueError if it differs between the texts.
    """
    if any(map(has_embedding, prompts)):
        both = encode_prompts(model, prompts)
        return torch.cat([states for states, _ in both]), torch.cat([states for _, states in both])

    def encode(tower: str) -> Tensor:
        with model.using(tower) as encoder:
            states: Tensor = encoder.encode(prompts)
        return check_finite("the text encoder", states)

    prior, decoder = (model.require(name) for name in TOWERS)
    states = encode(TOWERS[0])
    return states, states if decoder is prior else encode(TOWERS[1])


@torch.inference_mode()
def encode_prompt(model: Components, prompt: Prompt) -> tuple[Tensor, Tensor]:
    """Returns the text states [1, 77 n, c] of a prompt, for Stage C and for Stage B.

    A mix of prompts has the weighted average of their states. Raises ValueError if their n differs.
    """
    return encode_prompts(model, [prompt])[0]


def encode_prompts(model: Components, prompts: Sequence[Prompt]) -> list[tuple[Tensor, Tensor]]:
    """Returns the text states of prompts as `encode_prompt`, one text encoder after the other."""
    prior, decoder = (model.require(name) for name in TOWERS)
    with model.using(TOWERS[0]):
        states = [average_states(model, "prior", prompt) for prompt in prompts]
    if decoder is prior:
        return [(x, x) for x in states]
    with model.using(TOWERS[1]):
        return [(x, average_states(model, "decoder", prompt)) for x, prompt in zip(states, prompts, strict=True)]


def encode_request(
    model: Components, prompts: Sequence[Prompt], negative: str, sampling: SamplingSettings
) -> tuple[list[tuple[Tensor, Tensor]], tuple[Tensor | None, Tensor | None]]:
    """Returns the text states of prompts, and those of the negative prompt: None if no stage has guidance.

    Logs a warning about a negative prompt without guidance, the first time only.
    """
    if sampling.guided:
        *cond, uncond = encode_prompts(model, [*prompts, negative])
        return cond, uncond
    note = "the negative prompt has no effect without guidance: leave it out, or set a guidance above 1"
    if negative and note not in model.reported_words:
        model.reported_words.add(note)
        logger.warning(note)
    return encode_prompts(model, prompts), (None, None)


def average_states(model: Components, stage: str, prompt: Prompt) -> Tensor:
    """Returns the average of the states [1, 77 n, c] of a prompt's texts, by their weights.

    `stage` ("prior" or "decoder") is that whose text encoder is used.
    """
    weights = _weights(prompt)
    with model.using(f"{stage}_text_encoder") as encoder:
        states = [
            encode_with_embeddings(encoder, model.embeddings, stage, text)
            if has_embedding(text)
            else encoder.encode([text])
            for text in weights
        ]
    if len({x.shape for x in states}) > 1:
        raise ValueError("the prompts of a mix differ in length: use at most 75 tokens (about 50 words) in each")
    total = sum(weights.values())
    first, *others = (x * (weight / total) for x, weight in zip(states, weights.values(), strict=True))
    return check_finite("the text encoder", sum(others, first))


def check_request(
    model: Components, prompts: Sequence[Prompt], count: int, seed: Seed, *, with_pictures: bool = False
) -> Seed:
    """Returns the seed as plain numbers, and warns of unknown words.

    Raises ValueError for a wrong count or seed, or if a network is missing: the image encoder only `with_pictures`.
    """
    _, seed = check_count(count, seed)
    for name in PARTS_OF[model.version]:
        if with_pictures or name != "image_encoder":
            model.require(name)
    check_embeddings(model, [text for prompt in prompts for text in _weights(prompt)])
    warn_of_weights(model, prompts)
    warn_of_unknown_words(model, prompts)
    return seed


def warn_of_weights(model: Components, prompts: Iterable[Prompt]) -> None:
    """Logs a warning that names a weight such as (red:1.3) in a prompt that is read as written."""
    for text in (text for prompt in prompts for text in _weights(prompt) if not has_embedding(text)):
        if (found := _WEIGHT.search(text)) and found[0] not in model.reported_words:
            model.reported_words.add(found[0])
            logger.warning(
                f"{found[0]} is read as written, parentheses and number too: weights count only in ComfyUI and in "
                "prompts with an embedding"
            )


def warn_of_unknown_words(model: Components, prompts: Iterable[Prompt]) -> None:
    """Logs a warning that names the words that the model does not know; each word only the first time."""
    texts = [NAMES.sub(" ", text) for prompt in prompts for text in _weights(prompt)]
    if note := unknown_words_note(texts, model.metadata, model.reported_words, model.source):
        logger.warning(note)


def list_prompts(prompts: Prompt | Iterable[Prompt]) -> list[Prompt]:
    """Returns one or several prompts as a list. Raises ValueError if one is not a prompt."""
    several = to_list("prompt", prompts, str | Mapping)
    for prompt in several:
        _weights(prompt)
    return several


def _weights(prompt: Prompt) -> dict[str, float]:
    """Returns the weight of each text of a prompt. Raises ValueError unless all are finite and above 0."""
    if isinstance(prompt, str):
        return {prompt: 1.0}
    texts = list(prompt) if isinstance(prompt, Mapping) else [prompt]
    if (wrong := next((text for text in texts if not isinstance(text, str)), "")) != "":
        raise ValueError(f'a prompt must be a text, got {type(wrong).__name__}: give "" for an empty one')
    weights = {text: to_float(f"the weight of {text!r:.60}:", weight) for text, weight in prompt.items()}
    if not weights or not all(0 < weight < math.inf for weight in weights.values()):
        raise ValueError(f'prompt {weights}: give each text a weight above 0, such as {{"a cat": 2, "a dog": 1}}')
    return weights
