"""Losses, and the noise of training. Where no other source is given, they follow the original's training scripts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...common.dataclass_config import CountOrZero, Fraction, NotNegative, OneOf, Positive, Range, option
from ...diffusion.schedule import alpha_bar, diffuse, expand, p2_weight, training_times
from ...models.layers import TIME_SCALE, TimestepBlock, time_frequencies
from ...models.prior import PriorParams, features_from_latents, latents_from_features
from ..rng import StepRandom

REGRESSION_TIME = 0.95  # the image has 0.6 % of the variance
SLOW_TURNS = 16.0  # a frequency with at most this many periods between t = 0 and 1 is slow


@dataclass(frozen=True)
class TimesConfig:
    """The keys of `[noise]` for training times and empty captions.

    `focus` above 1 draws more times near 1, where the content of an image is decided: 1 - (1 - t)**focus instead of t.
    The first `regression` steps use one time with almost pure noise, so that the network first learns its
    conditioning. (Measured on the demo's Stage B, image error at t = 0.95: 0.013 after 1100 such steps, 0.054 after
    6100 steps of all times.)
    `slow_times` does not train the inputs of the time mappers that oscillate more than 16 times from t = 0 to 1: they
    are noise to a training of a few thousand steps.
    `distribution`: `original`, even, with 7.5 % of the times exactly 1; `uniform`, without these; or `logit_normal`, of
    which `logit_mean` and `logit_std` move and widen the peak (arXiv 2403.03206, section 3.1).
    """

    distribution: Annotated[str, OneOf(("original", "uniform", "logit_normal"))] = option(
        "original", "of the times: original, even with 7.5 % at pure noise; uniform; or logit_normal"
    )
    logit_mean: float = option(0.0, "logit_normal: 0 for a peak at t = 0.5, above 0 nearer to pure noise")
    logit_std: Positive = option(1.0, "logit_normal: width of the peak")
    time_range: tuple[Fraction, Fraction] = option(
        (0.0, 1.0), "least and largest time, to which the distribution is scaled"
    )
    stratified: bool = option(False, "spread the times of a batch evenly")
    focus: Positive = option(1.0, "above 1, more times near pure noise: 1 - (1 - t)**focus instead of t")
    regression: int = option(0, "first steps, all at one time with almost pure noise")
    slow_times: bool = option(False, "do not train the time mappers' fast frequencies")
    text_drop: Fraction = option(
        0.05, 'fraction of captions replaced by ""; the original empties as many whole batches'
    )

    def __post_init__(self) -> None:
        low, high = self.time_range
        if low >= high:
            raise ValueError(f"[noise] time_range must be the least and the largest time, got {list(self.time_range)}")
        if self.distribution != "logit_normal" and (self.logit_mean, self.logit_std) != (0.0, 1.0):
            raise ValueError(
                '[noise] logit_mean and logit_std need distribution = "logit_normal": set it, or remove them'
            )


@dataclass(frozen=True)
class NoiseConfig(TimesConfig):
    """The `[noise]` table of networks that predict noise.

    `weight` of the squared error:
    `p2`, the original's 1 - alpha_bar, gives times near 0 almost no weight.
    `v`, min(1 / alpha_bar, cap), is v-prediction's loss up to the cap (arXiv 2202.00512, appendix D); a small model
    learns the content of images several times faster with it.
    `x0`, the product of both, is the squared error of the image itself; unlike `v`, it is small near t = 0.
    `min_snr`, min(1, gamma / SNR) with SNR = alpha_bar / (1 - alpha_bar), gives all times with an SNR up to gamma the
    same weight (arXiv 2303.09556, equation 4 for predicted noise).
    `debiased`, 1 / sqrt(SNR): arXiv 2310.08442. `none`: 1, as in diffusers' script.
    `loss`: `huber` is half the squared error up to `huber_delta`, and linear beyond it.
    `offset` adds noise that is constant in each channel, which the network predicts too
    (www.crosslabs.org/blog/diffusion-with-offset-noise). `perturbation`, only to its input (arXiv 2301.11706).
    """

    weight: Annotated[str, OneOf(("p2", "v", "x0", "min_snr", "debiased", "none"))] = option(
        "p2", "weight of the error: p2 as in the original, v, x0, min_snr, debiased or none"
    )
    cap: float = option(40.0, "largest weight of v and x0, before the factor of x0")
    min_snr_gamma: Positive = option(5.0, "gamma of min_snr")
    loss: Annotated[str, OneOf(("mse", "l1", "huber"))] = option("mse", "error: mse, l1 or huber")
    huber_delta: Positive = option(1.0, "error from which on huber is linear")
    offset: NotNegative = option(0.0, "scale of further noise that is constant in each channel, such as 0.05")
    perturbation: NotNegative = option(0.0, "scale of further noise in the network's input, such as 0.1")

    def __post_init__(self) -> None:
        super().__post_init__()
        for key, needed, value in (("min_snr_gamma", "weight", "min_snr"), ("huber_delta", "loss", "huber")):
            if getattr(self, key) != getattr(NoiseConfig, key) and getattr(self, needed) != value:
                raise ValueError(f'[noise] {key} needs {needed} = "{value}": set it, or remove {key}')


@dataclass(frozen=True)
class FeatureCorruption(TimesConfig):
    """The keys of `[noise]` for Stage B's features; the defaults are the original's."""

    drop: Fraction = option(0.05, "fraction of features set to 0")
    noised: Fraction = option(0.3, "fraction of the others that gets noise")


@dataclass(frozen=True)
class DecoderNoiseConfig(FeatureCorruption, NoiseConfig):
    """The `[noise]` table of v2's Stage B."""


@dataclass(frozen=True)
class TokenNoiseConfig(FeatureCorruption):
    """The `[noise]` table of v1's Stage B."""

    smoothing: Annotated[float, Range(least=0, below=1)] = option(0.1, "label smoothing")
    places: CountOrZero = option(0, "random tokens of an image in the loss; 0: all, as in the original")


def draw_times(config: TimesConfig, step: int, rng: StepRandom) -> Tensor:
    """Returns training times [n] of a step. After the regression, 7.5 % of `original` are exactly 1 for every focus."""
    if step < config.regression:
        return torch.full((len(rng),), REGRESSION_TIME)
    uniform = rng.strata() if config.stratified else rng.uniform()
    if config.distribution == "original":
        t = training_times(uniform)
    elif config.distribution == "uniform":
        t = 1 - uniform
    else:
        t = torch.sigmoid(config.logit_mean + config.logit_std * torch.special.ndtri(uniform))
    low, high = config.time_range
    return low + (high - low) * (1 - (1 - t) ** config.focus)


def draw_noise(config: NoiseConfig, shape: Sequence[int], rng: StepRandom) -> tuple[Tensor, Tensor]:
    """Returns the noise [n, c, h, w] to add to latents of `shape` [c, h, w], and the noise to predict."""
    noise = rng.normal(*shape)
    if config.offset:
        noise = noise + config.offset * rng.normal(shape[0], 1, 1)
    return (noise + config.perturbation * rng.normal(*shape) if config.perturbation else noise), noise


def freeze_fast_times(net: nn.Module) -> None:
    """Masks the gradients of time mappers for fast frequencies: in a new network these weights stay 0."""
    for block in net.modules():
        if isinstance(block, TimestepBlock):
            weight = block.mapper.get_parameter("weight")
            mask = (time_frequencies(weight.shape[1]) * TIME_SCALE <= SLOW_TURNS * 2 * math.pi).repeat(2)
            weight.register_hook(lambda gradient, mask=mask: gradient * mask.to(gradient.device))


def noise_weight(config: NoiseConfig, t: Tensor) -> Tensor:
    """Returns the weight of the noise error at times t."""
    if config.weight == "none":
        return torch.ones_like(t)
    if config.weight == "p2":
        return p2_weight(t)
    if config.weight == "min_snr":
        return (config.min_snr_gamma * (1 / alpha_bar(t) - 1)).clamp(max=1)
    if config.weight == "debiased":
        return (1 / alpha_bar(t) - 1).sqrt()
    v_weight = (1 / alpha_bar(t)).clamp(max=config.cap)
    return v_weight * p2_weight(t) if config.weight == "x0" else v_weight


def squared_error(predicted: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
    """Returns the mean squared error (scalar); `weights` [B, 1, H, W] are factors of the errors."""
    return _mean_error(F.mse_loss, predicted, target, weights)


def absolute_error(predicted: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
    """Returns the mean absolute error (scalar); `weights` as in `squared_error`."""
    return _mean_error(F.l1_loss, predicted, target, weights)


def _mean_error(error: Callable[..., Tensor], predicted: Tensor, target: Tensor, weights: Tensor | None) -> Tensor:
    if weights is None:
        return error(predicted, target)
    return (error(predicted, target, reduction="none") * weights).mean()


def noise_error(config: NoiseConfig, predicted: Tensor, noise: Tensor) -> Tensor:
    """Returns the error of each number of the predicted noise."""
    if config.loss == "huber":
        return F.huber_loss(predicted, noise, reduction="none", delta=config.huber_delta)
    error = F.l1_loss if config.loss == "l1" else F.mse_loss
    return error(predicted, noise, reduction="none")


def resize_weights(weights: Tensor | None, size: Sequence[int]) -> Tensor | None:
    """Returns the weights of `ImageDataset.loss_weights` on a grid [B, 1, *size], averaged over area; None for None."""
    return None if weights is None else F.interpolate(weights, tuple(size), mode="area")


def noise_loss(
    config: NoiseConfig, predicted: Tensor, noise: Tensor, t: Tensor, weights: Tensor | None = None
) -> Tensor:
    """Returns the weighted mean error of the predicted noise (scalar); `weights` as in `squared_error`."""
    error = noise_error(config, predicted.float(), noise)
    per_sample = (error if weights is None else error * weights).flatten(1).mean(1)
    return (per_sample * noise_weight(config, t)).mean()


def token_weight(replaced: Tensor, t: Tensor) -> Tensor:
    """Returns the weight [B, H, W] of tokens at times t [B]: those that noise has not `replaced` count less."""
    return 1 - 0.7 * (~replaced).float() * (1 - t[:, None, None])


def token_loss(
    config: TokenNoiseConfig, logits: Tensor, tokens: Tensor, replaced: Tensor, t: Tensor, weights: Tensor | None = None
) -> Tensor:
    """Returns the weighted cross entropy (scalar) of logits [B, K, H, W] with clean tokens [B, H, W].

    `weights` [B, H, W] are factors of the tokens' losses.
    """
    entropy = F.cross_entropy(logits.float(), tokens, reduction="none", label_smoothing=config.smoothing)
    entropy = entropy if weights is None else entropy * weights
    weight = token_weight(replaced, t)
    return ((entropy * weight).flatten(1).sum(1) / weight.flatten(1).sum(1)).mean()


def corrupt_features(config: FeatureCorruption, features: Tensor, rng: StepRandom, units: PriorParams) -> Tensor:
    """Sets some of the features [B, 16, h, w] to 0 and adds noise of up to t = 0.5 to others.

    The noise is added in the prior's space, which `units` describes. The original draws once for a whole batch; here
    each sample draws for itself.
    """
    t = rng.uniform() * 0.5
    noise = rng.normal(*features.shape[1:])
    noisy = features_from_latents(diffuse(latents_from_features(features, units), t, noise), units)
    draw = rng.uniform()
    corrupted = config.drop + config.noised * (1 - config.drop)
    features = torch.where(expand(draw < corrupted, features), noisy, features)
    return torch.where(expand(draw < config.drop, features), torch.zeros_like(features), features)


def contrastive_loss(texts: Tensor, images: Tensor, scale: Tensor) -> Tensor:
    """Returns CLIP's symmetric loss (arXiv 2103.00020, figure 3) of pairs of unit vectors [B, c]."""
    logits = scale * texts @ images.T
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
