"""Random numbers of one training step, independent of how the batch is split over processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor


class StepRandom:
    """Random numbers for some samples of a step's batch.

    Each sample's numbers depend on the seed, the step and its index in the whole batch: two processes with half of a
    batch each draw what one process with all of it draws.
    """

    def __init__(self, seed: int, step: int, total: int, indices: Sequence[int] | None = None):
        """`indices` are the positions of the samples in the batch of `total`; None: all of them."""
        self.total = total
        self.indices = list(range(total) if indices is None else indices)
        self._shared = _generator(seed, step)
        self._own = [_generator(seed, step, i + 1) for i in self.indices]  # SeedSequence ignores a last 0

    def __len__(self) -> int:
        return len(self.indices)

    def uniform(self, *shape: int) -> Tensor:
        """Returns numbers [n, *shape] in [0, 1)."""
        return self._draw(torch.rand, shape)

    def normal(self, *shape: int) -> Tensor:
        """Returns standard normal numbers [n, *shape]."""
        return self._draw(torch.randn, shape)

    def integers(self, high: int, *shape: int) -> Tensor:
        """Returns integers [n, *shape] in [0, high)."""
        return self._draw(partial(torch.randint, high), shape)

    def _draw(self, draw: Callable[..., Tensor], shape: tuple[int, ...]) -> Tensor:
        if shape:
            return torch.stack([draw(shape, generator=own) for own in self._own])
        return draw((self.total,), generator=self._shared)[self.indices]

    def shared(self, high: int) -> int:
        """Returns one integer in [0, high), the same for all samples."""
        return int(torch.randint(high, (), generator=self._shared))

    def permutations(self, length: int) -> Tensor:
        """Returns a permutation [n, length] for each sample."""
        return torch.stack([torch.randperm(length, generator=own) for own in self._own])

    def strata(self) -> Tensor:
        """Returns numbers [n] in [0, 1): the whole batch has one in each of `total` equal intervals."""
        order = torch.randperm(self.total, generator=self._shared)
        return ((order + torch.rand(self.total, generator=self._shared)) / self.total)[self.indices]

    def pick(self, count: int) -> Tensor:
        """Returns indices [n] below `count`, without repetition in the whole batch if `count` suffices."""
        if self.total <= count:
            return torch.randperm(count, generator=self._shared)[: self.total][self.indices]
        return self.integers(count)


def _generator(*seeds: int) -> torch.Generator:
    (state,) = np.random.SeedSequence(seeds).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state))
