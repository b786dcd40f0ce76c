"""The images of every step as a pure function of (seed, epoch, step)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

CACHE_SIZE = 2  # epochs, and permutations of each bucket, kept in memory


class EpochOrder:
    """Shuffled batches of one bucket each; any step is computed directly, without the steps before it.

    Each bucket is an endless sequence of permutations of its members, cut into batches; what does not fill a batch
    carries over into the next epoch. After e epochs a bucket of n images has had ceil(e * n / batch) batches: every
    image was used at least e times, and no bucket more often than others, as dropped or padded remainders would cause.

    `batch` counts the images of all processes, so one process of 2N sees the same as two of N.
    """

    def __init__(self, members: Sequence[np.ndarray], batch: int, seed: int):
        """`members` are the image indices of each bucket; one bucket at least has some."""
        self.members, self.batch, self.seed = list(members), batch, seed
        self._counts = np.array([len(part) for part in members], dtype=object)  # Python integers never overflow
        self._permutations: list[dict[int, np.ndarray]] = [{} for _ in members]
        self._epochs: dict[int, np.ndarray] = {}

    def epoch(self, step: int) -> tuple[int, int]:
        """Returns the epoch of a step and the step's number in it."""
        low, high = 0, step * self.batch // int(self._counts.sum()) + 1
        while low < high:  # bisects for the last epoch that starts at or before the step
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self._first_step(middle) <= step else (low, middle - 1)
        return low, step - self._first_step(low)

    def batch_at(self, step: int) -> tuple[int, np.ndarray]:
        """Returns the bucket of a step and the image indices [batch] of its global batch."""
        bucket, number = self._bucket_batch(step)
        return bucket, self._images(bucket, np.arange(number * self.batch, (number + 1) * self.batch))

    def substitutes(self, step: int, slot: int) -> Iterator[int]:
        """Yields replacements for one image of the global batch: the others of its bucket, in the order that follows
        the batch, once each."""
        bucket, number = self._bucket_batch(step)
        tried = self._images(bucket, np.array([number * self.batch + slot])).tolist()
        for position in itertools.count((number + 1) * self.batch + slot):
            if len(tried) == self._counts[bucket]:
                return
            if (index := self._images(bucket, np.array([position])).item()) not in tried:
                tried.append(index)
                yield index

    def _batches_before(self, epoch: int) -> np.ndarray:
        """The number of batches that each bucket has had before an epoch."""
        return -(-epoch * self._counts // self.batch)

    def _first_step(self, epoch: int) -> int:
        return int(self._batches_before(epoch).sum())

    def _bucket_batch(self, step: int) -> tuple[int, int]:
        """Returns the bucket of a step and the number of its batch in the bucket's sequence."""
        epoch, number = self.epoch(step)
        if epoch not in self._epochs:
            first, last = self._batches_before(epoch), self._batches_before(epoch + 1)
            buckets = self._shuffled((0, epoch), np.repeat(np.arange(len(first)), (last - first).astype(np.int64)))
            numbers = np.empty_like(buckets)
            for bucket in range(len(first)):
                numbers[buckets == bucket] = np.arange(first[bucket], last[bucket])
            _remember(self._epochs, epoch, np.stack([buckets, numbers], axis=1))
        bucket, number = self._epochs[epoch][number].tolist()
        return bucket, number

    def _images(self, bucket: int, positions: np.ndarray) -> np.ndarray:
        """Returns the image indices at some positions of a bucket's endless sequence."""
        members, known = self.members[bucket], self._permutations[bucket]
        cycles, offsets = np.divmod(positions, len(members))
        out = np.empty(len(positions), dtype=np.int64)
        for cycle in np.unique(cycles).tolist():
            if cycle not in known:
                _remember(known, cycle, self._shuffled((bucket + 1, cycle), members))
            out[cycles == cycle] = known[cycle][offsets[cycles == cycle]]
        return out

    def _shuffled(self, key: tuple[int, int], values: np.ndarray) -> np.ndarray:
        return np.random.default_rng((self.seed, *key)).permutation(values)


def _remember(cache: dict[int, np.ndarray], key: int, value: np.ndarray) -> None:
    cache[key] = value
    if len(cache) > CACHE_SIZE:
        del cache[next(iter(cache))]
