"""The order of a run is a pure function of the seed and the step, and gives every picture its turn."""

from __future__ import annotations

import pickle
import random
from collections import Counter

import numpy as np
import pytest

from wuerstchen_core.training.data.epoch_order import EpochOrder

COUNTS = [(7,), (16, 3), (1, 1, 40), (5, 0, 9, 64)]


def plan(counts: tuple[int, ...], batch: int = 4, seed: int = 0) -> EpochOrder:
    """Buckets of so many examples, numbered through."""
    ends = np.cumsum(counts)
    return EpochOrder([np.arange(end - count, end) for count, end in zip(counts, ends, strict=True)], batch, seed)


def walk(plan: EpochOrder, steps: int) -> list[tuple[int, list[int]]]:
    return [(bucket, indices.tolist()) for bucket, indices in map(plan.at, range(steps))]


@pytest.mark.parametrize("counts", COUNTS)
def test_any_step_is_found_without_walking_there(counts: tuple[int, ...]) -> None:
    walked = walk(plan(counts), 120)
    for step in random.Random(0).sample(range(120), 30):
        bucket, indices = plan(counts).at(step)
        assert (bucket, indices.tolist()) == walked[step]
    jumping = plan(counts)  # and whatever it was asked before
    for step in random.Random(1).choices(range(120), k=60):
        assert jumping.at(step)[1].tolist() == walked[step][1]
    assert pickle.loads(pickle.dumps(jumping)).at(77)[1].tolist() == walked[77][1]
    assert plan(counts).at(10**15)[1].shape == (4,)


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("batch", [1, 4, 6])
def test_every_picture_has_its_turn_in_every_epoch(counts: tuple[int, ...], batch: int) -> None:
    it, seen, epoch = plan(counts, batch), Counter[int](), 0
    for step in range(400):
        if it.epoch(step)[0] != epoch:
            epoch = it.epoch(step)[0]
            assert min(seen[index] for index in range(sum(counts))) >= epoch
            # What was carried over is less than a batch of each bucket.
            assert seen.total() < epoch * sum(counts) + batch * len(counts)
        bucket, indices = it.at(step)
        assert set(indices.tolist()) <= set(it.members[bucket].tolist())
        seen.update(indices.tolist())
        for members in it.members:  # within a bucket, none is a whole turn ahead of another
            turns = [seen[index] for index in members.tolist()]
            assert not turns or max(turns) - min(turns) <= 1
    assert epoch > 3


def test_epochs_and_seeds_differ() -> None:
    first, second = walk(plan((64,)), 16), walk(plan((64,)), 32)[16:]
    assert sorted(sum((batch for _, batch in first), [])) == list(range(64))
    assert sorted(sum((batch for _, batch in second), [])) == list(range(64))
    assert first != second != walk(plan((64,), seed=1), 16)
    assert walk(plan((64,), seed=1), 16) != first
    mixed = [bucket for bucket, _ in walk(plan((40, 40)), 20)]
    assert mixed.count(0) == mixed.count(1) == 10 and mixed != sorted(mixed)


def test_a_spare_is_what_comes_next_in_the_bucket() -> None:
    it = plan((12, 40))
    walked = walk(it, 60)
    for step, (bucket, batch) in enumerate(walked[:40]):
        following = next(other for later, other in walked[step + 1 :] if later == bucket)
        spares = [next(plan((12, 40)).spares(step, slot)) for slot in range(4)]
        assert spares == following or set(following) & set(batch)
    for counts in ((1,), (3,), (12, 40)):  # in the end all the others of the bucket, once each
        bucket, batch = plan(counts).at(5)
        others = list(plan(counts).spares(5, 1))
        assert sorted([*others, int(batch[1])]) == plan(counts).members[bucket].tolist()


def test_what_makes_no_batch() -> None:
    for counts, batch in (((0, 0), 4), ((), 4), ((3,), 0)):
        with pytest.raises(ValueError, match=r"^no batch of \d can be made of \d pictures$"):
            plan(counts, batch)
