"""Sampling of discrete tokens by renoising ("Paella", arXiv 2211.07292, section 3): Stage B of v1."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..models.layers import nearest_codes
from .samplers import Progress, Seed, seeded_generators

MODES = ("multinomial", "argmax", "quantised")


class TokenNoise(Protocol):
    """Where the sampler's randomness comes from."""

    def uniform(self, like: Tensor) -> Tensor:
        """Numbers from 0 to 1, one for each token [B, H, W] of `like`."""
        ...

    def pick(self, probabilities: Tensor) -> Tensor:
        """One token [B, H, W] out of each of probabilities [B, K, H, W]."""
        ...


class SeededTokenNoise:
    """Randomness from one CPU generator a picture: a batch equals its singles.

    `pictures` is how many there are, or the places that they had in the batch that they were taken from.
    """

    def __init__(self, seed: Seed, pictures: int | Sequence[int]):
        self.generators = seeded_generators(seed, pictures)

    def tokens(self, num_labels: int, height: int, width: int) -> Tensor:
        """Random tokens [B, height, width] on the CPU: what the sampler starts from."""
        size = (height, width)
        return torch.stack([torch.randint(num_labels, size, generator=g) for g in self.generators])

    def uniform(self, like: Tensor) -> Tensor:
        return torch.stack([torch.rand(like.shape[1:], generator=g) for g in self.generators]).to(like.device)

    def pick(self, probabilities: Tensor) -> Tensor:
        """By the inverse of the cumulated probabilities: one random number a token, where a race of exponentials, as
        `torch.multinomial` runs it, would take one for each of the 8192 codes."""
        reached = probabilities.float().movedim(1, -1).cumsum(dim=-1)
        goal = self.uniform(reached[..., 0])[..., None] * reached[..., -1:]
        return torch.searchsorted(reached, goal, right=True)[..., 0].clamp_(max=reached.shape[-1] - 1)


def renoise(tokens: Tensor, noise: Tensor, t: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Replace a share t [B] of tokens [B, H, W], those where `uniform` is at most t, by `noise`; and where it did."""
    replaced = uniform <= t[:, None, None]
    return torch.where(replaced, noise, tokens), replaced


def choose(logits: Tensor, mode: str, temperature: float, codebook: Tensor, draw: TokenNoise) -> Tensor:
    """Tokens [B, H, W] out of logits [B, K, H, W]: drawn ("multinomial"), the likeliest ("argmax"), or the nearest to
    the mean of the codes [K, c] ("quantised")."""
    if mode == "argmax":
        return logits.argmax(dim=1)
    probabilities = (logits.float() / temperature).softmax(dim=1)
    if mode == "multinomial":
        return draw.pick(probabilities)
    if mode != "quantised":
        raise ValueError(f"the token mode {mode!r} is unknown: choose one of {', '.join(MODES)}")
    means = probabilities.movedim(1, -1) @ codebook.to(probabilities)
    return nearest_codes(means.flatten(0, 2), codebook.to(means)).view(means.shape[:3])


def sample_tokens(
    model: Callable[[Tensor, Tensor, float], Tensor],
    tokens: Tensor,
    times: Tensor,
    *,
    noise: Tensor,
    draw: TokenNoise,
    codebook: Tensor,
    scales: Sequence[float],
    temperatures: Sequence[float],
    mode: str = "multinomial",
    quantised_from: int | None = None,
    renoise_steps: int | None = None,
    init: Tensor | None = None,
    mask: Tensor | None = None,
    callback: Progress | None = None,
) -> Tensor:
    """Walk tokens [B, H, W] along times [N + 1]; `model(tokens, t, scale)` gives the guided logits.

    Each step chooses all tokens anew, by its own scale and temperature, and replaces a share t of them by `noise` (the
    same all the way) again, except after the last step, or already after `renoise_steps` of them. From step
    `quantised_from` on the mode is "quantised". With `init` and `mask` [B, H, W] (true: paint), the rest stays `init`.
    """
    if (init is None) != (mask is None):
        raise ValueError("init and mask belong together: give both, or neither")
    steps = len(times) - 1
    renoise_steps = steps - 1 if renoise_steps is None else renoise_steps
    for i in range(steps):
        t, t_next = (times[j].to(tokens.device).expand(len(tokens)) for j in (i, i + 1))
        logits = model(tokens, t, scales[i])
        now = "quantised" if quantised_from is not None and i >= quantised_from else mode
        chosen = choose(logits, now, temperatures[i], codebook, draw)
        if init is not None and mask is not None:
            chosen = torch.where(mask, chosen, init)
        previous, tokens = tokens, chosen
        if i < renoise_steps:
            tokens, _ = renoise(chosen, noise, t_next, draw.uniform(chosen))
        if callback is not None:
            callback(i, steps, previous, chosen)
    return tokens
