"""The loss on held-out images, at times and noises that are the same at every step and in every run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from .rng import StepRandom
from .stage import Stage

BATCH = 8  # images in a forward pass
DRAWS = 64  # times and noises at least; fewer images are used several times each
PATIENCE = 3  # validations after the lowest loss before a warning


@torch.no_grad()
def validation_loss(stage: Stage[Any], net: nn.Module, autocast: Callable[[], AbstractContextManager[Any]]) -> float:
    """Returns the mean loss of a network on the held-out images of a stage's dataset."""
    count = stage.dataset.held_out
    repeats = -(-DRAWS // count)
    total, seen = 0.0, 0
    for first, picked, size in stage.dataset.held_out_batches(BATCH):
        for start in range(first, count * repeats, count):
            rng = StepRandom(0, 0, count * repeats, range(start, start + size))
            with autocast():
                total += size * stage.validation_loss(net, picked, rng).item()
            seen += size
    return total / seen


def rise(losses: Sequence[tuple[int, float]]) -> str:
    """Returns a warning if the losses (step, loss) begin to rise with the last one, else ""."""
    if not _has_risen(losses) or _has_risen(losses[:-1]):
        return ""
    (step, lowest), (last, now) = min(losses, key=lambda row: row[1]), losses[-1]
    return (
        f"the validation loss has risen from {lowest:.4f} at step {step} to {now:.4f} at step {last}, so the model "
        f"overfits: use weights of about step {step}, or train with more pictures, a lower rate or dropout"
    )


def _has_risen(losses: Sequence[tuple[int, float]]) -> bool:
    """True if at least `PATIENCE` losses follow the lowest one, and the last is above it by more than 1 %."""
    if not losses:
        return False
    best = min(range(len(losses)), key=lambda i: losses[i][1])
    return len(losses) - 1 - best >= PATIENCE and losses[-1][1] > 1.01 * losses[best][1]
