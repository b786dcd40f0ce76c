"""Reads batches of images in worker processes, whose number does not change the batches."""

from __future__ import annotations

import hashlib
import itertools
import multiprocessing
import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from functools import partial
from threading import Thread
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.lib.recfunctions import drop_fields
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ...common.text import listed
from ...inference.image_files import take_turns, turn
from .caption_tokens import pad_states
from .draws import Key, Purpose, generator
from .epoch_order import EpochOrder
from .error_budget import ErrorBudget
from .filters import ImageDataConfig
from .left_out import LeftOut
from .sidecars import MissingCaption
from .source import ImageSource

T = TypeVar("T")
WORKERS = 4  # by default
MAX_SUBSTITUTES = 20  # tries to replace an unreadable image


class Example(NamedTuple):
    """An image with its caption."""

    image: Tensor  # [3, H, W] uint8; empty if it is not needed
    caption: str
    cached: dict[str, Tensor]  # tensors of a cache by name
    weight: float = 1.0  # of its loss
    pixel_weights: Tensor | None = None  # [H, W] of its loss; None if no example has a mask
    hint: Tensor | None = None  # [3, H, W] uint8 for a ControlNet, if hint pictures are read

    def mirrored(self) -> Example:
        """Returns the example with its image, mask and hint mirrored horizontally; cached tensors are as they are."""
        pixel_weights = None if self.pixel_weights is None else self.pixel_weights.flip(-1)
        hint = None if self.hint is None else self.hint.flip(-1)
        return self._replace(image=self.image.flip(-1), pixel_weights=pixel_weights, hint=hint)


@dataclass
class Batch:
    """The examples of one process in one step."""

    images: Tensor  # [n, 3, H, W] uint8; [n, 0] where images are not needed
    captions: list[str]
    next: int  # the position to start at after this batch
    cached: dict[str, Tensor]  # tensors of a cache, [n, ...] by name
    weights: Tensor  # [n] of the losses
    pixel_weights: Tensor | None  # [n, H, W] of the losses, if masks are used
    hints: Tensor | None = None  # [n, 3, H, W] uint8, if hint pictures are read


@dataclass
class ReadResult:
    """A worker's message: a batch, or None if it could not be filled, and the counts since its last message."""

    batch: Batch | None = None
    read: int = 0  # images, the bad ones included
    bad: dict[str, str] = field(default_factory=dict)  # unreadable images: name → reason
    shards: dict[str, str] = field(default_factory=dict)  # shards read: URL → what was wrong, or ""
    reasons: Counter[str] = field(default_factory=Counter)  # images by reason of rejection, "" for those used
    left_out: LeftOut = field(default_factory=LeftOut)  # files that are no examples


@dataclass(kw_only=True, eq=False)
class BatchLoader(ABC):
    """An endless sequence of batches of the selected images; process `rank` of `world` reads its part of each."""

    config: ImageDataConfig
    captions: bool = True  # False: not needed, "" instead
    images: bool = True  # False: not needed, empty tensors instead
    cached: tuple[str, ...] = ()  # names of the tensors to read from a cache
    rank: int = 0
    world: int = 1

    @abstractmethod
    def batches(self, start: int = 0) -> Iterator[Batch]:
        """Yields batches from `start` on: 0, or the `next` of the last batch used.

        ValueError once more than the fraction `bad_share` of the images or shards is unreadable.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """Returns a hash of all that determines the batches; a run resumes exactly only if it has not changed."""

    @property
    def default_workers(self) -> int:
        """Number of worker processes unless the configuration has one."""
        return WORKERS

    def results(self, dataset: Dataset[T], order: Iterable[Any] | None = None) -> Iterator[T]:
        """Yields the workers' results in order."""
        generator = torch.Generator()  # DataLoader draws an unused seed, by default from torch's global generator
        workers = self.default_workers if self.config.workers is None else self.config.workers
        options: dict[str, Any] = {"num_workers": workers, "generator": generator}
        if workers:
            options["worker_init_fn"] = partial(_start_worker, multiprocessing.RLock())
        yield from DataLoader(dataset, None, sampler=order, **options)


@dataclass(kw_only=True, eq=False)
class IndexedLoader(BatchLoader, Dataset[ReadResult]):
    """Loads the images of a source in an epoch order, from any step on. As a torch dataset, item n is step n.

    An unreadable image is replaced by the next readable one of its bucket.
    """

    source: ImageSource
    order: EpochOrder
    held_out: Sequence[np.ndarray] = ()  # the images of each bucket that are for validation, which `order` lacks
    hints: bool = False  # True: hint pictures beside the images are read
    variants: Mapping[int, np.ndarray] = field(default_factory=dict)  # the examples one of which an image's first is

    @property
    def default_workers(self) -> int:
        return min(WORKERS, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)

    def batches(self, start: int = 0) -> Iterator[Batch]:
        budget = ErrorBudget("images", self.config.bad_share)
        for result in self.results(self, itertools.count(start)):
            budget.add(result.read, result.bad)
            if result.batch is None:
                raise ValueError(f"{len(result.bad)} images in a row cannot be used: {listed(list(result.bad))}")
            yield result.batch

    def read_mask(self, index: int, bucket: int, *key: int) -> Image.Image | None:
        """Returns the mask of an example in grey, cropped as its image; None if it has none."""
        kind = self.config.examples[self.source.origins[index]].mask
        mask = self.source.mask(index, kind) if kind else None
        return None if mask is None else self.config.crop_mask(mask, bucket, *key)

    def read_caption(self, index: int, *key: int) -> str:
        """Returns the caption of an example as it is read."""
        return self.config.examples[self.source.origins[index]].edit(self.plain_caption(index), key)

    def plain_caption(self, index: int) -> str:
        """Returns the caption in an example's file; "" if it has none, and `[data]` has something to read instead."""
        try:
            return self.source.caption(index)
        except MissingCaption:
            if not self.config.examples[self.source.origins[index]].fixed_edits:
                raise
            return ""

    def captions_from(self, step: int) -> Iterator[tuple[str, str]]:
        """Yields names and captions of an epoch's examples, of steps in order, without those that cannot be read."""
        for number in range(step, step + -(-self.order.images // self.order.batch)):
            for slot, index in enumerate(self.order.batch_at(number)[1].tolist()):
                key = self.order.seed, number, slot
                index = self.variant(index, key)
                with suppress(ValueError):
                    yield self.source.names[index], self.read_caption(index, *key)

    def variant(self, index: int, key: Key) -> int:
        """Returns the example to read for the first one of an image."""
        variants = self.variants.get(index) if key else None
        return index if variants is None else int(generator(key, Purpose.CAPTION).choice(variants))

    def fingerprint(self) -> str:
        settings = self.config.sizes, self.config.crop == "random", self.order.batch, self.order.seed
        digest = hashlib.sha256(repr(settings).encode())
        if any(changed := [own.changed() for own in self.config.examples]):
            digest.update(repr(changed).encode())
        for members in self.order.members:
            if self.variants:
                members = np.concatenate([members[:0], *(self.variants.get(i, [i]) for i in members.tolist())])
            names = "\n".join(self.source.names[index] for index in members.tolist())
            digest.update(names.encode(errors="surrogatepass"))  # file names that are not UTF-8
            digest.update(drop_fields(self.source.records[members], "line", usemask=False).tobytes())
        if self.config.sources:
            counts = [[pool.per_epoch for pool in pools] for pools in self.order.pools]
            digest.update(repr(counts).encode())
        return digest.hexdigest()[:16]

    def __getitem__(self, step: int) -> ReadResult:
        bucket, indices = self.order.batch_at(step)
        size, result, examples = self.order.batch // self.world, ReadResult(), []
        for slot in range(self.rank * size, (self.rank + 1) * size):
            substitutes = itertools.islice(self.order.substitutes(step, slot), MAX_SUBSTITUTES)
            for index in itertools.chain([int(indices[slot])], substitutes):
                if (example := self.read_example(result, index, bucket, self.order.seed, step, slot)) is not None:
                    examples.append(example)
                    break
            else:
                return result
        result.batch = collate(examples, step + 1)
        return result

    def read_example(self, result: ReadResult, index: int, bucket: int, *key: int) -> Example | None:
        """Reads the needed parts of an example and counts it in `result`; None if it is damaged.

        Its crop, flip and caption depend on `key`; without one nothing is random.
        """
        index = self.variant(index, key)
        source, image, origin = self.source, torch.empty(0, dtype=torch.uint8), self.source.origins[index]
        options, weight = self.config.examples[origin], self.config.parts[origin].weight
        mirrored = options.flips(key)
        result.read += 1
        try:
            caption = self.read_caption(index, *key) if self.captions else ""
            cached = source.cached_tensors(index, self.cached, mirrored)
            hint = None
            if self.images:
                record = source.records[index]
                sizes = [(int(record["width"]), int(record["height"]))]
                if self.hints:
                    sizes.append(source.hint_size(index))
                with turn(max(width * height for width, height in sizes)):
                    image = options.recoloured(self.config.crop_image(source.image(index), bucket, *key), key)
                    if self.hints:
                        hint = self.config.crop_image(source.hint(index), bucket, *key)
            pixel_weights = None
            if any(own.mask for own in self.config.examples):
                mask = self.read_mask(index, bucket, *key)
                pixel_weights = options.pixel_weights(mask, self.config.sizes[bucket], source.names[index])
        except ValueError as error:
            result.bad[source.names[index]] = str(error)
            return None
        example = Example(image, caption, cached, weight, pixel_weights, hint)
        return example.mirrored() if mirrored else example


def _start_worker(lock: AbstractContextManager[bool], worker: int) -> None:
    """Ends this worker process when its parent has ended, which torch itself checks only while the worker is idle.

    It reads large pictures only while it has the lock.
    """
    take_turns(lock)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    Thread(target=watch, daemon=True).start()


def collate(examples: Sequence[Example], following: int = 0) -> Batch:
    """Returns the batch of some examples; `following` is its `next`."""
    images, captions, tensors, weights, pixel_weights, hints = zip(*examples, strict=True)
    cached = {}
    for name in tensors[0]:
        cached[name], mask = pad_states([one[name] for one in tensors])  # texts may differ in length
        if mask is not None:
            cached[f"{name}_mask"] = mask
    masked = None if pixel_weights[0] is None else torch.stack(pixel_weights)
    given = None if hints[0] is None else torch.stack(hints)
    return Batch(torch.stack(images), list(captions), following, cached, torch.tensor(weights), masked, given)
