"""The order of a run: which pictures every step trains on, as a pure function of (seed, epoch, step)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

KEPT = 2  # epochs, and permutations of each bucket, that are remembered


class EpochOrder:
    """Batches of one bucket each, shuffled; any step is found without walking there.

    The members of a bucket follow each other in one endless sequence, a fresh permutation of all after the other,
    which is cut into batches: what does not fill a batch is carried into the next epoch, in front of it. After e
    epochs a bucket of n has given ceil(e·n / batch) batches: every picture was seen at least e times, and none of any
    bucket is starved or favoured, as it would be if remainders were dropped or made up in each epoch.

    `batch` counts the pictures of all processes: one process of 2N and two of N see the same.
    """

    def __init__(self, members: Sequence[np.ndarray], batch: int, seed: int):
        self.members, self.batch, self.seed = list(members), batch, seed
        self._counts = np.array(
            [len(part) for part in members], dtype=object
        )  # Python's integers, which never overflow
        if batch < 1 or not any(self._counts):
            raise ValueError(f"no batch of {batch} can be made of {sum(self._counts)} pictures")
        self._permutations: list[dict[int, np.ndarray]] = [{} for _ in members]
        self._epochs: dict[int, np.ndarray] = {}

    def epoch(self, step: int) -> tuple[int, int]:
        """The epoch that a step belongs to, and its place there."""
        low, high = 0, step * self.batch // int(self._counts.sum()) + 1
        while low < high:  # the last epoch that begins at the step or before
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self._begins(middle) <= step else (low, middle - 1)
        return low, step - self._begins(low)

    def at(self, step: int) -> tuple[int, np.ndarray]:
        """The bucket of a step, and the examples [batch] of its global batch."""
        bucket, number = self._batch(step)
        return bucket, self._examples(bucket, np.arange(number * self.batch, (number + 1) * self.batch))

    def spares(self, step: int, slot: int) -> Iterator[int]:
        """What may stand in for the example in a slot of the global batch: the others of its bucket, once each, as
        they come after the batch."""
        bucket, number = self._batch(step)
        tried = self._examples(bucket, np.array([number * self.batch + slot])).tolist()
        for place in itertools.count((number + 1) * self.batch + slot):
            if len(tried) == self._counts[bucket]:
                return
            if (index := self._examples(bucket, np.array([place])).tolist()[0]) not in tried:
                tried.append(index)
                yield index

    def _begins(self, epoch: int) -> int:
        """The first step of an epoch."""
        return int((-(-epoch * self._counts // self.batch)).sum())

    def _batch(self, step: int) -> tuple[int, int]:
        """The bucket of a step, and which of the bucket's batches it is."""
        epoch, place = self.epoch(step)
        if epoch not in self._epochs:
            ends = [-(-e * self._counts // self.batch) for e in (epoch, epoch + 1)]
            buckets = np.repeat(np.arange(len(self.members)), (ends[1] - ends[0]).astype(np.int64))
            batches = np.stack([self._shuffled((0, epoch), buckets)] * 2, axis=1)
            for bucket, (first, last) in enumerate(zip(*ends, strict=True)):
                batches[batches[:, 0] == bucket, 1] = np.arange(first, last)
            _remember(self._epochs, epoch, batches)
        bucket, number = self._epochs[epoch][place].tolist()
        return bucket, number

    def _examples(self, bucket: int, places: np.ndarray) -> np.ndarray:
        """What stands at places of a bucket's endless sequence."""
        members, known = self.members[bucket], self._permutations[bucket]
        cycles, offsets = np.divmod(places, len(members))
        out = np.empty(len(places), dtype=np.int64)
        for cycle in np.unique(cycles).tolist():
            if cycle not in known:
                _remember(known, cycle, self._shuffled((bucket + 1, cycle), members))
            out[cycles == cycle] = known[cycle][offsets[cycles == cycle]]
        return out

    def _shuffled(self, key: tuple[int, int], values: np.ndarray) -> np.ndarray:
        return np.random.default_rng((self.seed, *key)).permutation(values)


def _remember(known: dict[int, np.ndarray], key: int, value: np.ndarray) -> None:
    known[key] = value
    if len(known) > KEPT:
        del known[next(iter(known))]  # the oldest
