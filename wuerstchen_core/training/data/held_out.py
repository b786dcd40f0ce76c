"""Images that are held out of training, to compute the validation loss on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np

from ...common.dataclass_config import Count, Range, option


@dataclass(frozen=True)
class ValidationConfig:
    """The `[validation]` table."""

    fraction: Annotated[float, Range(least=0, below=1)] = option(
        0.0, "fraction of the pictures to hold out of training, at least one; 0: no validation"
    )
    most: Count = option(256, "largest number of pictures to hold out")
    every: Count = option(250, "steps from one validation to the next, from step 0 on")


NO_VALIDATION = ValidationConfig()


def by_image(records: np.ndarray, buckets: np.ndarray, used: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the indices of the `used` examples, those of an image side by side, and the numbers of their images."""
    order = np.flatnonzero(used)
    order = order[np.argsort(buckets[order], kind="stable")]  # as in a cache
    return order, np.cumsum(records["line"][order] == 0)


def hold_out(config: ValidationConfig, records: np.ndarray, buckets: np.ndarray, used: np.ndarray) -> np.ndarray:
    """Returns which of the `used` images to hold out, [N] like the arguments: an image with all its captions.

    They depend on the images and the table alone, not on a seed, and are the same in a cache of the images.
    """
    order, image = by_image(records, buckets, used)
    count = int(image[-1]) if len(image) else 0
    chosen = np.random.default_rng(0).permutation(count)[: min(config.most, max(1, round(config.fraction * count)))] + 1
    out = np.zeros(len(used), dtype=bool)
    if config.fraction:
        out[order[np.isin(image, chosen)]] = True
    return out
