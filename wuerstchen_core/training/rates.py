"""Learning rates: their course over the steps, and their factors for some of the weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from .config import FALLS, LoopConfig

FACTOR = "lr_factor"  # the key of a parameter group whose rate is not the one of the others


def learning_rate(config: LoopConfig, step: int) -> float:
    """Returns the learning rate at a step as a fraction of `lr`: warmup, constant, `lr_schedule` at the end."""
    decay_steps = max(1.0, config.steps * config.decay)
    remaining = min(1.0, max(0.0, (config.steps - step) / decay_steps))
    if config.lr_cycles > 1 and remaining > 0:
        remaining = remaining * config.lr_cycles % 1 or 1.0
    fall = config.lr_least + (1 - config.lr_least) * FALLS[config.lr_schedule](remaining)
    return min((step + 1) / max(1, config.warmup), fall)


def set_factors(net: nn.Module, patterns: Mapping[str, float]) -> dict[str, float]:
    """Returns the factor of the rate of each trained weight, and freezes those whose factor is 0.

    That is the one of the first pattern found in its name, else 1. ValueError for patterns that are found in none.
    """
    names = [name for name, p in net.named_parameters() if p.requires_grad]
    factors: dict[str, float] = {}
    for pattern, factor in patterns.items():
        try:
            found = [name for name in names if re.search(pattern, name)]
        except re.error as error:
            raise ValueError(f"[train] lr_factors has an invalid pattern {pattern!r} ({error}): correct it") from error
        if not found:
            raise ValueError(f"[train] lr_factors: no trained weight has {pattern!r} in its name, such as {names[0]}")
        factors = dict.fromkeys(found, factor) | factors
    for name, p in net.named_parameters():
        p.requires_grad_(p.requires_grad and factors.get(name, 1.0) > 0)
    if all(factors.get(name, 1.0) == 0 for name in names):
        raise ValueError("[train] lr_factors freezes all weights: leave some out")
    return factors


def parameter_groups(weights: Mapping[str, nn.Parameter], factors: Mapping[str, float]) -> list[dict[str, Any]]:
    """Returns an optimizer's groups of weights with the same factor, those with factor 1 first."""
    found: dict[float, list[nn.Parameter]] = {}
    for name, p in weights.items():
        found.setdefault(factors.get(name, 1.0), []).append(p)
    ordered = sorted(found.items(), key=lambda item: item[0] != 1)
    return [{"params": group, **({} if factor == 1 else {FACTOR: factor})} for factor, group in ordered]
