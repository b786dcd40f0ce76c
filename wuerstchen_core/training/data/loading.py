"""Batches of pictures, read by worker processes, the same whatever their number."""

from __future__ import annotations

import hashlib
import itertools
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .buckets import fit
from .epoch_order import EpochOrder
from .error_budget import ErrorBudget, listed
from .filters import Choice
from .source import Source

TRIES = 20  # spares for one bad picture, before that is given up


@dataclass
class Batch:
    """What one process trains on in one step."""

    images: Tensor  # [n, 3, H, W] uint8; [n, 0] where they are not asked for
    captions: list[str]
    names: list[str]
    next: int  # where to start, to go on after this batch
    kept: dict[str, Tensor] = field(default_factory=dict)  # of a cache, [n, ...] by name


@dataclass
class Reading:
    """What a worker hands over: a batch, or none, and what there is to count."""

    batch: Batch | None = None
    pictures: int = 0  # read, the bad ones among them
    bad: dict[str, str] = field(default_factory=dict)  # pictures, by name: why
    shards: dict[str, str] = field(default_factory=dict)  # read, by whole URL: what was bad about it, or ""
    reasons: Counter[str] = field(default_factory=Counter)  # why pictures were left out, "" for those that stay


class Pictures(ABC):
    """Batches without end. `exact` says whether a resumed run sees what it would have seen."""

    exact: bool

    def __init__(self, choice: Choice, workers: int, bad_share: float):
        self.choice, self.workers, self.bad_share = choice, workers, bad_share

    @abstractmethod
    def batches(self, start: int = 0) -> Iterator[Batch]:
        """The batches of this process from `start` on, which is 0 or the `next` of the last batch trained on.

        ValueError when more than the set share is bad.
        """

    def _readings(self, dataset: Dataset[Reading], order: Iterator[int] | None) -> Iterator[Reading]:
        """What the workers read, in order; chance that others draw from is left alone."""
        own = torch.Generator()  # of which the loader draws a seed for its workers, which use none
        yield from DataLoader(dataset, batch_size=None, sampler=order, num_workers=self.workers, generator=own)


class IndexedPictures(Pictures):
    """The batches of a plan over a source that is read in any order: resumed exactly, at any step.

    Of every global batch, process `rank` of `world` reads its part. A picture that can't be read is replaced by the
    next good one of its bucket.
    """

    exact = True

    def __init__(
        self, source: Source, plan: EpochOrder, choice: Choice, *, workers: int = 0, bad_share: float = 0.05,
        rank: int = 0, world: int = 1,
    ):  # fmt: skip
        super().__init__(choice, workers, bad_share)
        self.source, self.plan = source, plan
        self._steps = _Steps(source, plan, choice, rank, world)

    def batches(self, start: int = 0) -> Iterator[Batch]:
        tally = ErrorBudget("pictures", self.bad_share)
        for reading in self._readings(self._steps, itertools.count(start)):
            tally.add(reading.pictures, reading.bad)
            if reading.batch is None:
                raise ValueError(f"{len(reading.bad)} pictures in a row cannot be used: {listed(list(reading.bad))}")
            yield reading.batch

    def fingerprint(self) -> str:
        """What the order of the run depends on, in short: another one means that a resumed run is not exact."""
        settings = self.choice.sizes, self.choice.random_crop, self.plan.batch, self.plan.seed
        digest = hashlib.sha256(repr(settings).encode())
        for members in self.plan.members:
            names = "\n".join(self.source.name(index) for index in members.tolist())
            digest.update(names.encode(errors="surrogatepass"))  # of file names that are no UTF-8
            digest.update(self.source.entries[members].tobytes())
        return digest.hexdigest()[:16]


@dataclass
class _Steps(Dataset[Reading]):
    """The reading of a step, by its number: what workers run."""

    source: Source
    plan: EpochOrder
    choice: Choice
    rank: int
    world: int

    def __getitem__(self, step: int) -> Reading:
        bucket, indices = self.plan.at(step)
        size, out = self.plan.batch // self.world, Reading()
        examples, names = [], []
        for slot in range(self.rank * size, (self.rank + 1) * size):
            spares = itertools.islice(self.plan.spares(step, slot), TRIES)
            for index in itertools.chain([int(indices[slot])], spares):
                out.pictures += 1
                centre = crop_centre(self.choice.random_crop, self.plan.seed, step, slot)
                try:
                    examples.append(read_example(self.source, self.choice, index, bucket, centre))
                except ValueError as error:
                    out.bad[self.source.name(index)] = str(error)
                    continue
                names.append(self.source.name(index))
                break
            else:
                return out
        images, captions, kept = zip(*examples, strict=True)
        tensors = {name: torch.stack([one[name] for one in kept]) for name in self.choice.kept}
        out.batch = Batch(torch.stack(images), list(captions), names, step + 1, tensors)
        return out


def read_example(
    source: Source, choice: Choice, index: int, bucket: int, centre: tuple[float, float] = (0.5, 0.5)
) -> tuple[Tensor, str, dict[str, Tensor]]:
    """Of an example the picture [3, H, W] uint8 (empty if it isn't asked for), the caption, and what a cache keeps.

    ValueError says what can't be read.
    """
    caption = source.caption(index) if choice.captions else ""
    kept = source.kept(index, choice.kept)
    if not choice.images:
        return torch.empty(0, dtype=torch.uint8), caption, kept
    return fit(source.picture(index), choice.sizes[bucket], centre), caption, kept


def crop_centre(random: bool, *key: int) -> tuple[float, float]:
    """Where a crop lies in the room there is, left to right and top to bottom; by chance, it is a function of `key`."""
    if not random:
        return 0.5, 0.5
    x, y = np.random.default_rng(key).random(2).tolist()
    return x, y
