"""What both sides are told: where the weights are, and on what and how they compute."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .weights import Sizes

Clock = Callable[[], float]  # seconds


@dataclass(frozen=True)
class Setting:
    """Of one stage in one dtype."""

    stage: str
    dtype: str  # of the weights and the inputs
    folder: Path
    sizes: Sizes
    device: Any
    clock: Clock
    steps: tuple[int, int]  # of a whole picture: of Stage C and Stage B
    full: bool = False  # every step of a picture is done; else SHORT of each stage, and the rest is made up
    compute: torch.dtype | None = None  # None: that of the weights
