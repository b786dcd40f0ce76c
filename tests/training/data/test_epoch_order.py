"""The order of a run is a pure function of seed and step, and uses all images equally often."""

from __future__ import annotations

import pickle
import random
from collections import Counter

import numpy as np
import pytest

from wuerstchen_core.training.data.epoch_order import EpochOrder

COUNTS = [(7,), (16, 3), (1, 1, 40), (5, 0, 9, 64)]


def make_order(counts: tuple[int, ...], batch: int = 4, seed: int = 0) -> EpochOrder:
    """An order of consecutive image indices, `counts` of them in each bucket."""
    ends = np.cumsum(counts)
    return EpochOrder([np.arange(end - count, end) for count, end in zip(counts, ends, strict=True)], batch, seed)


def walk(order: EpochOrder, steps: int) -> list[tuple[int, list[int]]]:
    return [(bucket, indices.tolist()) for bucket, indices in map(order.batch_at, range(steps))]


@pytest.mark.parametrize("counts", COUNTS)
def test_any_step_is_computed_directly(counts: tuple[int, ...]) -> None:
    walked = walk(make_order(counts), 120)
    for step in random.Random(0).sample(range(120), 30):
        bucket, indices = make_order(counts).batch_at(step)
        assert (bucket, indices.tolist()) == walked[step]
    jumping = make_order(counts)  # the cached epochs and permutations do not matter
    for step in random.Random(1).choices(range(120), k=60):
        assert jumping.batch_at(step)[1].tolist() == walked[step][1]
    assert pickle.loads(pickle.dumps(jumping)).batch_at(77)[1].tolist() == walked[77][1]
    assert make_order(counts).batch_at(10**15)[1].shape == (4,)


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("batch", [1, 4, 6])
def test_every_image_is_used_in_every_epoch(counts: tuple[int, ...], batch: int) -> None:
    order, seen, epoch = make_order(counts, batch), Counter[int](), 0
    for step in range(400):
        if order.epoch(step)[0] != epoch:
            epoch = order.epoch(step)[0]
            assert min(seen[index] for index in range(sum(counts))) >= epoch
            # Each bucket carries over less than a batch.
            assert seen.total() < epoch * sum(counts) + batch * len(counts)
        bucket, indices = order.batch_at(step)
        assert set(indices.tolist()) <= set(order.members[bucket].tolist())
        seen.update(indices.tolist())
        for members in order.members:  # within a bucket, counts differ by one at most
            turns = [seen[index] for index in members.tolist()]
            assert not turns or max(turns) - min(turns) <= 1
    assert epoch > 3


def test_epochs_and_seeds_differ() -> None:
    first, second = walk(make_order((64,)), 16), walk(make_order((64,)), 32)[16:]
    assert sorted(sum((batch for _, batch in first), [])) == list(range(64))
    assert sorted(sum((batch for _, batch in second), [])) == list(range(64))
    assert first != second != walk(make_order((64,), seed=1), 16)
    assert walk(make_order((64,), seed=1), 16) != first
    mixed = [bucket for bucket, _ in walk(make_order((40, 40)), 20)]
    assert mixed.count(0) == mixed.count(1) == 10 and mixed != sorted(mixed)


def test_substitutes_are_the_next_images_of_the_bucket() -> None:
    order = make_order((12, 40))
    walked = walk(order, 60)
    for step, (bucket, batch) in enumerate(walked[:40]):
        following = next(other for later, other in walked[step + 1 :] if later == bucket)
        spares = [next(make_order((12, 40)).substitutes(step, slot)) for slot in range(4)]
        assert spares == following or set(following) & set(batch)
    for counts in ((1,), (3,), (12, 40)):  # all the others of the bucket, once each
        bucket, batch = make_order(counts).batch_at(5)
        others = list(make_order(counts).substitutes(5, 1))
        assert sorted([*others, int(batch[1])]) == make_order(counts).members[bucket].tolist()
