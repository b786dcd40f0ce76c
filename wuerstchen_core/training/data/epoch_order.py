"""The images of every step as a pure function of (seed, epoch, step)."""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Iterator, Sequence

import numpy as np

CACHE_SIZE = 2  # permutations of each bucket, and of the epochs' batches, in memory


class EpochOrder:
    """Shuffled batches of one bucket each; any step is computed directly, without the steps before it.

    Each bucket is an endless sequence of permutations of its members, cut into batches; what does not fill a batch
    carries over into the next epoch. After e epochs a bucket of n images has had ceil(e * n / batch) batches: every
    image was used at least e times, and no bucket more often than others, as dropped or padded remainders would cause.

    `batch` counts the images of all processes, so one process of 2N sees the same as two of N.
    """

    def __init__(self, members: Sequence[np.ndarray], batch: int, seed: int):
        """`members` are the image indices of each bucket; at least one bucket must have some."""
        self.members, self.batch, self.seed = list(members), batch, seed
        self._counts = np.array([len(part) for part in members], dtype=object)  # Python integers never overflow
        self._shuffled: list[dict[int, np.ndarray]] = [{} for _ in range(len(members) + 1)]

    def epoch(self, step: int) -> tuple[int, int]:
        """Returns the epoch of a step and the step's number in it."""
        epochs = range(step * self.batch // int(self._counts.sum()) + 2)
        epoch = bisect_right(epochs, step, key=self._first_step) - 1
        return epoch, step - self._first_step(epoch)

    def batch_at(self, step: int) -> tuple[int, np.ndarray]:
        """Returns the bucket of a step and the image indices [batch] of its global batch."""
        bucket, number = self._bucket_batch(step)
        return bucket, self._images(bucket, np.arange(number * self.batch, (number + 1) * self.batch))

    def substitutes(self, step: int, slot: int) -> Iterator[int]:
        """Yields replacements for the image at index `slot` of the global batch: each other image of its bucket once,
        beginning with the one at this index of the bucket's next batch."""
        bucket, number = self._bucket_batch(step)
        tried = self._images(bucket, np.array([number * self.batch + slot])).tolist()
        for position in itertools.count((number + 1) * self.batch + slot):
            if len(tried) == self._counts[bucket]:
                return
            if (index := self._images(bucket, np.array([position])).item()) not in tried:
                tried.append(index)
                yield index

    def _batches_before(self, epoch: int) -> np.ndarray:
        """Returns the number of batches [buckets] that each bucket has had before an epoch."""
        return -(-epoch * self._counts // self.batch)

    def _first_step(self, epoch: int) -> int:
        return int(self._batches_before(epoch).sum())

    def _bucket_batch(self, step: int) -> tuple[int, int]:
        """Returns the bucket of a step and the number of its batch in the bucket's sequence."""
        epoch, number = self.epoch(step)
        first, last = self._batches_before(epoch), self._batches_before(epoch + 1)
        buckets = self._permutation(0, epoch, np.repeat(np.arange(len(first)), (last - first).astype(np.int64)))
        bucket = int(buckets[number])
        return bucket, first[bucket] + np.count_nonzero(buckets[:number] == bucket)

    def _images(self, bucket: int, positions: np.ndarray) -> np.ndarray:
        """Returns the image indices at some positions of a bucket's endless sequence."""
        members = self.members[bucket]
        cycles, offsets = np.divmod(positions, len(members))
        out = np.empty(len(positions), dtype=np.int64)
        for cycle in np.unique(cycles).tolist():
            out[cycles == cycle] = self._permutation(bucket + 1, cycle, members)[offsets[cycles == cycle]]
        return out

    def _permutation(self, sequence: int, number: int, values: np.ndarray) -> np.ndarray:
        """Returns permutation `number` of a sequence: 0 is that of the epochs' batches, i + 1 that of bucket i."""
        known = self._shuffled[sequence]
        if number not in known:
            known[number] = np.random.default_rng((self.seed, sequence, number)).permutation(values)
            if len(known) > CACHE_SIZE:
                del known[next(iter(known))]
        return known[number]
