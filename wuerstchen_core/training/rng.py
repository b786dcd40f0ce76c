"""The chance of a training step, the same however its batch is divided over processes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class StepRandom:
    """All that is drawn for some samples of a step's batch.

    What a sample draws depends on the seed, the step and its place in the whole batch: one process that takes all of it
    sees what two see that take a half each.
    """

    def __init__(self, seed: int, step: int, total: int, places: Sequence[int] | None = None):
        """`places` are those of the samples in the batch of `total`; None: all."""
        self.total = total
        self.places = list(range(total) if places is None else places)
        self._together = _generator(seed, step)
        self._own = [_generator(seed, step, place + 1) for place in self.places]  # numpy takes a last 0 for nothing

    def __len__(self) -> int:
        return len(self.places)

    def mine(self, whole: Tensor) -> Tensor:
        """The rows of the own samples, of what was drawn for the whole batch."""
        return whole[self.places]

    def uniform(self, *shape: int) -> Tensor:
        """Numbers [n, *shape] in [0, 1)."""
        if shape:
            return torch.stack([torch.rand(shape, generator=own) for own in self._own])
        return self.mine(torch.rand(self.total, generator=self._together))

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers [n, *shape]."""
        return torch.stack([torch.randn(shape, generator=own) for own in self._own])

    def integers(self, high: int, *shape: int) -> Tensor:
        """Whole numbers [n, *shape] from 0 to high - 1."""
        if shape:
            return torch.stack([torch.randint(high, shape, generator=own) for own in self._own])
        return self.mine(torch.randint(high, (self.total,), generator=self._together))

    def shared(self, high: int) -> int:
        """One whole number from 0 to high - 1 for all samples."""
        return int(torch.randint(high, (), generator=self._together))

    def permutations(self, length: int) -> Tensor:
        """The numbers from 0 to length - 1 in an order of its own for each sample, [n, length]."""
        return torch.stack([torch.randperm(length, generator=own) for own in self._own])

    def strata(self) -> Tensor:
        """A number [n] in [0, 1) of each sample: one in each of as many equal parts as the whole batch has samples."""
        order = torch.randperm(self.total, generator=self._together)
        return self.mine((order + torch.rand(self.total, generator=self._together)) / self.total)

    def pick(self, count: int) -> Tensor:
        """Which [n] of `count` things the samples take: each thing once at most, where there are enough."""
        if self.total <= count:
            return self.mine(torch.randperm(count, generator=self._together)[: self.total])
        return self.integers(count)


def _generator(*seeds: int) -> torch.Generator:
    (state,) = np.random.SeedSequence(seeds).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state))
