"""Datasets of image files, as the stages read them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...common.dataclass_config import from_table
from ..rng import StepRandom
from ..stages.networks import COMPUTED_BY, weights_fingerprint
from .buckets import fit
from .dataset import Compute, ImageDataset, InMemoryDataset, as_it_is
from .demo import DemoDataConfig, DemoDataset, MultiShapeDemoDataset
from .latent_cache import Record, no_words
from .loading import Batch, IndexedPictures
from .open import ImageDataConfig, cache_of, open_pictures

log = logging.getLogger(__name__)

SHOWN = 24  # pictures of a sheet
STREAM = "stream"  # in place of a fingerprint


class FileDataset(ImageDataset):
    """The batches of a `[data]` table that names a source; what networks make of them is computed as they come, or
    taken of a cache."""

    def __init__(self, data: Mapping[str, Any], captions: bool = True, made_by: Callable[[str], str] = str):
        """`made_by` gives the fingerprint of the network that would compute something, by the name of that."""
        self.config, self._captions = from_table(ImageDataConfig, data, "data"), captions
        self.side = min(min(size) for size in self.config.sizes)
        self.square = set(self.config.sizes) == {(self.side, self.side)}
        self._batches: Iterator[Batch] = iter(())
        self.cache, self._made_by = cache_of(self.config), made_by
        self._kept: set[str] = set()  # names of what is taken of the cache
        self._computed: set[str] = set()  # and of what is made of pictures

    def start_reading(
        self, position: int, fingerprint: str, *, batch: int, seed: int, cache: Path, rank: int, world: int
    ) -> None:
        told: dict[str, Any] = {"batch": batch, "seed": seed, "cache": cache, "rank": rank, "world": world}
        told["captions"] = self._captions and "text" not in self._kept
        told["images"] = bool(self._computed) or not self._kept  # who asks for nothing by name views them
        if self.cache is not None:
            self._check(*self.cache, told["images"])
        self._pictures = open_pictures(self.config, **told, kept=tuple(sorted(self._kept)))
        indexed = isinstance(self._pictures, IndexedPictures)
        self.fingerprint = self._pictures.fingerprint() if isinstance(self._pictures, IndexedPictures) else STREAM
        if fingerprint and fingerprint != self.fingerprint:
            log.warning("the pictures or how they are read have changed: this run does not go on exactly")
            if (fingerprint == STREAM) == indexed:  # a position is the number of a shard in the one, of a batch else
                position = 0
        self.position, self._batches = position, self._pictures.batches(position)

    @staticmethod
    def _check(folder: Path, record: Record, images: bool) -> None:
        """Say what a cache lacks; ValueError if it is all that is needed."""
        if images and not record.pictures:
            raise ValueError(f"{folder} keeps no pictures, of which this stage learns: name these as [data] source")
        if (there := len(list(folder.glob("*.tar")))) < record.shards:
            log.warning("%s has %d of its %d shards: `train cache` makes the rest", folder, there, record.shards)

    def sample_batch(self, rng: StepRandom) -> Batch:
        picked = next(self._batches)
        self.position = picked.next
        return picked

    def captions(self, picked: Batch, rng: StepRandom, drop: float = 0.0) -> list[str]:
        return ["" if empty else text for empty, text in zip(rng.uniform() < drop, picked.captions, strict=True)]

    def images(self, picked: Batch) -> Tensor:
        return picked.images.float() / 255

    def must_compute(self, name: str) -> bool:
        """Whether no cache holds it. ValueError if a cache holds what another network made, or lacks what is needed."""
        if self.cache is None:
            return True
        folder, record = self.cache
        if name in record.networks:
            if record.networks[name] != self._made_by(name):
                raise ValueError(
                    f"the {name} in {folder} are of another network than this run's: name that one under [inputs], or "
                    "make another cache by `train cache`"
                )
            return False
        if name != "text" and not record.pictures:
            raise ValueError(
                f"{folder} keeps neither {name} nor pictures to compute them of: make it again by `train cache`, with "
                f'"{name}" among what is kept under [cache]'
            )
        return True

    def map_images(self, name: str, compute: Compute, derive: Compute = as_it_is) -> Callable[[Batch], Tensor]:
        if self.must_compute(name):
            self._computed.add(name)
            return lambda picked: derive(compute(self.images(picked)))
        self._kept.add(name)
        return lambda picked: derive(picked.kept[name].float())

    def map_captions(self, compute: Callable[[list[str]], Tensor]) -> Callable[[Batch, StepRandom, float], Tensor]:
        if self.cache is None or self.must_compute("text"):
            return super().map_captions(compute)
        self._kept.add("text")
        nothing = no_words(self.cache.folder)

        def kept(picked: Batch, rng: StepRandom, drop: float) -> Tensor:
            empty = rng.uniform() < drop
            return torch.where(empty[:, None, None], nothing, picked.kept["text"].float())

        return kept

    def preview_images(self) -> InMemoryDataset | None:
        """The first pictures of the fullest bucket, which are trained on, too; None of a stream, and of a cache that
        keeps none."""
        if not isinstance(self._pictures, IndexedPictures) or (self.cache and not self.cache.record.pictures):
            return None
        source, plan = self._pictures.source, self._pictures.plan
        bucket = max(range(len(plan.members)), key=lambda i: len(plan.members[i]))
        images, texts = [], []
        for index in plan.members[bucket].tolist():
            try:
                texts.append(source.caption(index) if self._captions else "")
                images.append(fit(source.picture(index), self.config.sizes[bucket]))
            except ValueError:  # training names it
                texts = texts[: len(images)]
            if len(images) == SHOWN:
                break
        return InMemoryDataset(torch.stack(images), texts)


def open_dataset(config: Mapping[str, Any], captions: bool = True, tower: str = COMPUTED_BY["text"][1]) -> ImageDataset:
    """The pictures that a configuration asks for: of the source that its `[data]` table names, or the demo's.

    Without `captions` none are needed; `tower` is the part of a bundle that reads them.
    """
    data = config.get("data", {})
    if isinstance(data, Mapping) and "source" in data:
        made_by = cache(partial(weights_fingerprint, config, tower=tower))  # it is asked more than once
        return FileDataset(data, captions, made_by)
    several = len(from_table(DemoDataConfig, data, "data").shapes) > 1
    return MultiShapeDemoDataset(data) if several else DemoDataset(data)
