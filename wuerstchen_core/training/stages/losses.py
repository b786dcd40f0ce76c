"""Losses, and the noise that training adds (sources: the original's training scripts, unless said)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...diffusion.schedule import alpha_bar, diffuse, expand, p2_weight, training_times
from ...models.layers import TIME_SCALE, TimestepBlock, time_frequencies
from ...models.prior import PriorParams, features_from_latents, latents_from_features
from ..rng import StepRandom

REGRESSION_TIME = 0.95  # 0.6 % of the variance is the picture's
QUICKEST_TURNS = 16.0  # of a frequency, from t = 0 to 1


@dataclass(frozen=True)
class TimesConfig:
    """Which times are drawn, and how often the text is missing.

    `focus` above 1 draws more times near 1, where what the picture shows is decided: 1 - (1 - t)**focus instead of t.
    `regression` steps at the start know one time alone, at which there is little but noise to see: the network first
    learns what its conditioning says. (Measured on the demo's Stage B, the error of the picture at t = 0.95: 0.013
    after 1100 such steps, 0.054 after 6100 of all times.)
    `slow_times` leaves the time mappers blind to the frequencies that turn more than 16 times from t = 0 to 1: to a
    training of a few thousand steps they are noise.
    """

    stratified: bool = False  # spread the times of a batch evenly
    focus: float = 1.0
    regression: int = 0
    slow_times: bool = False
    text_drop: float = 0.05  # share of captions that are empty; the original empties as many whole batches

    def __post_init__(self) -> None:
        if not 0 <= self.text_drop <= 1:
            raise ValueError(f"[noise] text_drop is a share from 0 to 1, got {self.text_drop}")
        if self.focus <= 0:
            raise ValueError(f"[noise] focus must be above 0, got {self.focus}")


@dataclass(frozen=True)
class NoiseConfig(TimesConfig):
    """The `[noise]` table of noise prediction: which times are drawn, and which are weighed how.

    `p2` is the original's weight (1 - alpha_bar), which leaves almost nothing for times near the picture.
    `v` weighs the error of the noise by min(1 / alpha_bar, cap): up to the cap, v-prediction's loss
    (arXiv 2202.00512, appendix D); a small model learns what a picture is several times sooner with it.
    `x0` is both: the squared error of the picture itself, which leaves times near it, where v is large, aside.
    """

    weight: str = "p2"
    cap: float = 40.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weight not in ("p2", "v", "x0"):
            raise ValueError(f"[noise] weight {self.weight!r} is unknown: choose p2, v or x0")


@dataclass(frozen=True)
class FeatureCorruption:
    """How often Stage B's features are spoilt in training, and how; the defaults are the original's."""

    drop: float = 0.05  # share of features that are dropped
    noised: float = 0.3  # share of the others that are noised

    def __post_init__(self) -> None:
        for name in ("drop", "noised"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"[noise] {name} is a share from 0 to 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class DecoderNoiseConfig(FeatureCorruption, NoiseConfig):
    """The `[noise]` table of v2's Stage B."""

    def __post_init__(self) -> None:
        FeatureCorruption.__post_init__(self)
        NoiseConfig.__post_init__(self)


@dataclass(frozen=True)
class TokenNoiseConfig(FeatureCorruption, TimesConfig):
    """The `[noise]` table of v1's Stage B."""

    smoothing: float = 0.1  # share of a label that all the codes have in common
    places: int = 0  # how many tokens of a picture, by chance, the loss looks at; 0: all, as the original

    def __post_init__(self) -> None:
        FeatureCorruption.__post_init__(self)
        TimesConfig.__post_init__(self)
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"[noise] smoothing is a share from 0 to below 1, got {self.smoothing}")
        if self.places < 0:
            raise ValueError(f"[noise] places must be 0 (all) or more, got {self.places}")


def draw_times(config: TimesConfig, step: int, rng: StepRandom) -> Tensor:
    """Training times [n] of a step; after the regression 7.5 % are exactly 1, whatever the focus."""
    if step < config.regression:
        return torch.full((len(rng),), REGRESSION_TIME)
    uniform = rng.strata() if config.stratified else rng.uniform()
    return 1 - (1 - training_times(uniform)) ** config.focus


def freeze_quick_times(net: nn.Module) -> None:
    """Let no gradient change what the time mappers make of quick frequencies: nothing at all, in a new network; in one
    that was trained before, what weight decay leaves of it."""
    for block in net.modules():
        if isinstance(block, TimestepBlock):
            weight = block.mapper.get_parameter("weight")
            slow = time_frequencies(weight.shape[1]) * TIME_SCALE <= QUICKEST_TURNS * 2 * math.pi
            weight.register_hook(partial(_masked, slow.repeat(2)))


def _masked(mask: Tensor, gradient: Tensor) -> Tensor:
    return gradient * mask.to(gradient.device)


def noise_weight(config: NoiseConfig, t: Tensor) -> Tensor:
    """Weight of the squared noise error at times t."""
    if config.weight == "p2":
        return p2_weight(t)
    v_weight = (1 / alpha_bar(t)).clamp(max=config.cap)
    return v_weight * p2_weight(t) if config.weight == "x0" else v_weight


def noise_loss(config: NoiseConfig, predicted: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Weighted squared error of the predicted noise, averaged (scalar)."""
    per_sample = F.mse_loss(predicted.float(), noise, reduction="none").flatten(1).mean(1)
    return (per_sample * noise_weight(config, t)).mean()


def token_weight(replaced: Tensor, t: Tensor) -> Tensor:
    """Weight [B, H, W] of each token's error at times t [B]: tokens that were not `replaced` by noise count less."""
    return 1 - 0.7 * (~replaced).float() * (1 - t[:, None, None])


def token_loss(config: TokenNoiseConfig, logits: Tensor, tokens: Tensor, replaced: Tensor, t: Tensor) -> Tensor:
    """Weighted cross entropy (scalar) of logits [B, K, H, W] with the clean tokens [B, H, W]."""
    entropy = F.cross_entropy(logits.float(), tokens, reduction="none", label_smoothing=config.smoothing)
    weight = token_weight(replaced, t)
    return ((entropy * weight).flatten(1).sum(1) / weight.flatten(1).sum(1)).mean()


def corrupt_features(
    config: FeatureCorruption,
    features: Tensor,
    rng: StepRandom,
    units: PriorParams = PriorParams(),  # noqa: B008 (frozen)
) -> Tensor:
    """What Stage B sees of the features [B, 16, h, w] in training: some dropped (0), some noised up to t = 0.5.

    The noise is added in the `units` of the release's prior. The default shares are the original's, which draws once a
    batch; here each sample draws for itself.
    """
    t = rng.uniform() * 0.5
    noise = rng.normal(*features.shape[1:])
    noisy = features_from_latents(diffuse(latents_from_features(features, units), t, noise), units)
    draw = rng.uniform()
    spoilt = config.drop + config.noised * (1 - config.drop)
    features = torch.where(expand(draw < spoilt, features), noisy, features)
    return torch.where(expand(draw < config.drop, features), torch.zeros_like(features), features)


def contrastive_loss(texts: Tensor, pictures: Tensor, scale: Tensor) -> Tensor:
    """CLIP's symmetric loss (arXiv 2103.00020, figure 3) over pairs of unit vectors [B, c]."""
    logits = scale * texts @ pictures.T
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
