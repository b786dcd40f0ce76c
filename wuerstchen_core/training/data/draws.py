"""Random numbers for one use of an example, independent of the number of workers and processes."""

from __future__ import annotations

from enum import IntEnum

import numpy as np

Key = tuple[int, ...]  # identifies a use of an example: seed, step and index in the whole batch; () for no randomness


class Purpose(IntEnum):
    """The uses of random numbers besides the crop's: those of one do not depend on whether another has any."""

    FLIP = 1
    CAPTION = 2
    TAGS = 3
    COLOURS = 4


def generator(key: Key, purpose: Purpose) -> np.random.Generator:
    """Returns the random numbers of a use of an example for a purpose."""
    return np.random.default_rng((*key, purpose))
