"""The images of every step as a pure function of (seed, epoch, step)."""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

CACHE_SIZE = 2  # permutations of each bucket, and of the epochs' batches, in memory


class Pool(NamedTuple):
    """Images of a bucket with equal repeats, of which every epoch has the next `per_epoch` of an endless sequence."""

    images: np.ndarray
    per_epoch: int


class EpochOrder:
    """Shuffled batches of one bucket each; any step is computed directly, without the steps before it.

    Each bucket is an endless sequence of permutations of its members, cut into batches; what does not fill a batch
    carries over into the next epoch. After e epochs a bucket of n images has had ceil(e * n / batch) batches: every
    image was used at least e times, and no bucket more often than others, as dropped or padded remainders would cause.

    With repeats r, an epoch has round(r * n) of n images with these repeats, at least one: of r = 0.1 another tenth in
    each epoch, of r = 2 each image twice.

    `batch` counts the images of all processes, so one process of 2N sees the same as two of N.
    """

    def __init__(
        self, members: Sequence[np.ndarray], batch: int, seed: int, repeats: Sequence[np.ndarray] | None = None
    ):
        """`members` are the different image indices of each bucket; at least one bucket must have some. `repeats` says
        how often an epoch has each of them; None: once."""
        self.members, self.batch, self.seed = list(members), batch, seed
        self.pools = [
            _pools(part, np.ones(len(part)) if repeats is None else repeats[bucket])
            for bucket, part in enumerate(members)
        ]
        counts = [sum(pool.per_epoch for pool in pools) for pools in self.pools]
        self._counts = np.array(counts, dtype=object)  # Python integers never overflow
        self._shuffled: list[dict[int, np.ndarray]] = [{} for _ in range(len(members) + 1)]

    @property
    def images(self) -> int:
        """The number of images in an epoch, repeated ones included."""
        return int(self._counts.sum())

    def epoch(self, step: int) -> tuple[int, int]:
        """Returns the epoch of a step and the step's number in it."""
        epochs = range(step * self.batch // self.images + 2)
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
            if len(tried) == len(self.members[bucket]):
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
        counts = (last - first).astype(np.int64)
        buckets = self._permutation(0, epoch, lambda: np.repeat(np.arange(len(first)), counts))
        bucket = int(buckets[number])
        return bucket, first[bucket] + np.count_nonzero(buckets[:number] == bucket)

    def _images(self, bucket: int, positions: np.ndarray) -> np.ndarray:
        """Returns the image indices at some positions of a bucket's endless sequence."""
        cycles, offsets = np.divmod(positions, int(self._counts[bucket]))
        out = np.empty(len(positions), dtype=np.int64)
        for cycle in np.unique(cycles).tolist():
            permutation = self._permutation(bucket + 1, cycle, partial(self._cycle_members, bucket, cycle))
            out[cycles == cycle] = permutation[offsets[cycles == cycle]]
        return out

    def _cycle_members(self, bucket: int, cycle: int) -> np.ndarray:
        """Returns the images of a bucket in one of its permutations, in no particular order."""
        parts = []
        for number, (images, count) in enumerate(self.pools[bucket], 1):
            if count % len(images) == 0:
                parts.append(np.tile(images, count // len(images)))
            else:
                turns, offsets = np.divmod(np.arange(cycle * count, (cycle + 1) * count), len(images))
                for turn in np.unique(turns).tolist():  # SeedSequence ignores a last 0
                    rng = np.random.default_rng((self.seed, bucket + 1, number, turn + 1))
                    parts.append(rng.permutation(images)[offsets[turns == turn]])
        return np.concatenate(parts)

    def _permutation(self, sequence: int, number: int, values: Callable[[], np.ndarray]) -> np.ndarray:
        """Returns permutation `number` of a sequence: 0 is that of the epochs' batches, i + 1 that of bucket i."""
        known = self._shuffled[sequence]
        if number not in known:
            known[number] = np.random.default_rng((self.seed, sequence, number)).permutation(values())
            if len(known) > CACHE_SIZE:
                del known[next(iter(known))]
        return known[number]


def _pools(members: np.ndarray, repeats: np.ndarray) -> list[Pool]:
    pools = [(members[repeats == x], x) for x in np.unique(repeats).tolist()]
    return [Pool(images, max(1, round(x * len(images)))) for images, x in pools]
