"""Sampling of discrete tokens by renoising ("Paella", arXiv 2211.07292, section 3): Stage B of v1."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..common.numbers import check_finite
from ..common.text import check_choice
from ..models.layers import nearest_codes
from .samplers import Progress, Seed, seeded_generators

MODES = ("multinomial", "argmax", "quantised")


class SeededTokenNoise:
    """Random numbers from one CPU generator per picture, so that a batch equals its singles.

    `pictures` is their number, or their indices in a larger batch.
    """

    def __init__(self, seed: Seed, pictures: int | Sequence[int]):
        self.generators = seeded_generators(seed, pictures)

    def tokens(self, num_labels: int, height: int, width: int) -> Tensor:
        """Returns random tokens [B, height, width] on the CPU, from which sampling starts."""
        size = (height, width)
        return torch.stack([torch.randint(num_labels, size, generator=g) for g in self.generators])

    def uniform(self, like: Tensor) -> Tensor:
        """Returns numbers from 0 to 1, one for each token [B, H, W] of `like`."""
        return torch.stack([torch.rand(like.shape[1:], generator=g) for g in self.generators]).to(like.device)

    def pick(self, probabilities: Tensor) -> Tensor:
        """Returns tokens [B, H, W] drawn from probabilities [B, K, H, W].

        Inverts the cumulative distribution, with one random number per token; `torch.multinomial` draws one for each of
        the 8192 codes.
        """
        cumulative = probabilities.float().movedim(1, -1).cumsum(dim=-1)
        target = self.uniform(cumulative[..., 0])[..., None] * cumulative[..., -1:]
        return torch.searchsorted(cumulative, target, right=True)[..., 0].clamp_(max=cumulative.shape[-1] - 1)


def renoise(tokens: Tensor, noise: Tensor, t: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Replaces tokens [B, H, W] by `noise` where `uniform` is at most t [B]; returns the result and the mask."""
    replaced = uniform <= t[:, None, None]
    return torch.where(replaced, noise, tokens), replaced


def choose(logits: Tensor, mode: str, temperature: float, codebook: Tensor, draw: SeededTokenNoise) -> Tensor:
    """Returns tokens [B, H, W] chosen from logits [B, K, H, W], in one of MODES.

    multinomial: drawn; argmax: the likeliest; quantised: the nearest to the mean of the codes [K, c].
    """
    check_choice("token mode", mode, MODES)
    if mode == "argmax":
        return logits.argmax(dim=1)
    probabilities = (logits.float() / temperature).softmax(dim=1)
    if mode == "multinomial":
        return draw.pick(probabilities)
    means = probabilities.movedim(1, -1) @ codebook.to(probabilities)
    return nearest_codes(means.flatten(0, 2), codebook.to(means)).view(means.shape[:3])


def sample_tokens(
    model: Callable[[Tensor, Tensor, float], Tensor],
    tokens: Tensor,
    times: Tensor,
    *,
    noise: Tensor,
    draw: SeededTokenNoise,
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
    """Samples tokens [B, H, W] along times [N + 1]; `model(tokens, t, scale)` returns guided logits.

    Each step chooses all tokens, with its own scale and temperature, and then replaces a fraction t of them by `noise`
    (the same in all steps). The last step does not, nor do those from `renoise_steps` on. From step `quantised_from`
    on the mode is "quantised". With `init` and `mask` [B, H, W] (1: generate, 0: keep), a token stays `init` in the
    steps at times above its mask's value: the value is the strength of image to image there. ValueError if logits are
    not finite.
    """
    if (init is None) != (mask is None):
        raise ValueError("init and mask belong together: give both or neither")
    steps = len(times) - 1
    renoise_steps = steps - 1 if renoise_steps is None else renoise_steps
    extremes: list[Tensor] = []  # of the logits
    for i in range(steps):
        t, t_next = (times[j].to(tokens.device).expand(len(tokens)) for j in (i, i + 1))
        logits = model(tokens, t, scales[i])
        extremes += logits.aminmax()
        now = "quantised" if quantised_from is not None and i >= quantised_from else mode
        chosen = choose(logits, now, temperatures[i], codebook, draw)
        if init is not None and mask is not None:
            chosen = torch.where(mask >= t[:, None, None], chosen, init)
        previous, tokens = tokens, chosen
        if i < renoise_steps:
            tokens, _ = renoise(chosen, noise, t_next, draw.uniform(chosen))
        if callback is not None:
            callback(i, steps, previous, chosen)
    for extreme in extremes:  # here, since reading one waits for a GPU
        check_finite("Stage B", extreme)
    return tokens
