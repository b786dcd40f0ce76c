"""Pictures of one's own to train on, as the stages take them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..tables import from_table
from .chance import Chance
from .data.buckets import fit
from .data.loading import Batch, IndexedPictures
from .data.opening import PicturesConfig, open_pictures
from .pictures import DataConfig, DemoPictures, DemoShapes, Pictures, Shown

log = logging.getLogger(__name__)

SHOWN = 24  # pictures of a sheet
STREAM = "stream"  # in place of a fingerprint


class FilePictures(Pictures):
    """The batches of a `[data]` table that names a source; what networks make of them is computed as they come."""

    def __init__(self, data: Mapping[str, Any], captions: bool = True):
        self.config, self._captions = from_table(PicturesConfig, data, "data"), captions
        self.side = min(min(size) for size in self.config.sizes)
        self.square = set(self.config.sizes) == {(self.side, self.side)}
        self._batches: Iterator[Batch] = iter(())

    def begin(
        self, position: int, fingerprint: str, *, batch: int, seed: int, cache: Path, rank: int, world: int
    ) -> None:
        told: dict[str, Any] = {"batch": batch, "seed": seed, "cache": cache, "rank": rank, "world": world}
        self._pictures = open_pictures(self.config, **told, captions=self._captions)
        indexed = isinstance(self._pictures, IndexedPictures)
        self.fingerprint = self._pictures.fingerprint() if isinstance(self._pictures, IndexedPictures) else STREAM
        if fingerprint and fingerprint != self.fingerprint:
            log.warning("the pictures or how they are read have changed: this run does not go on exactly")
            if (fingerprint == STREAM) == indexed:  # a position is the number of a shard in the one, of a batch else
                position = 0
        self.position, self._batches = position, self._pictures.batches(position)

    def pick(self, chance: Chance) -> Batch:
        picked = next(self._batches)
        self.position = picked.next
        return picked

    def captions(self, picked: Batch, chance: Chance, drop: float = 0.0) -> list[str]:
        return ["" if empty else text for empty, text in zip(chance.uniform() < drop, picked.captions, strict=True)]

    def view(self, picked: Batch) -> Tensor:
        return picked.images.float() / 255

    def each(self, compute: Callable[[Tensor], Tensor]) -> Callable[[Batch], Tensor]:
        return lambda picked: compute(self.view(picked))

    def held(self) -> Shown | None:
        """The first pictures of the fullest bucket, which are trained on, too; of a stream none."""
        if not isinstance(self._pictures, IndexedPictures):
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
        return Shown(torch.stack(images), texts)


def pictures_of(config: Mapping[str, Any], captions: bool = True) -> Pictures:
    """The pictures that a configuration asks for: of the source that its `[data]` table names, or the demo's.

    Without `captions` none are needed.
    """
    data = config.get("data", {})
    if isinstance(data, Mapping) and "source" in data:
        return FilePictures(data, captions)
    several = len(from_table(DataConfig, data, "data").shapes) > 1
    return DemoShapes(data) if several else DemoPictures(data)
