"""The interface between training images and the stages."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..rng import StepRandom

AT_ONCE = 32  # pictures that a network sees

Compute: TypeAlias = Callable[[Tensor], Tensor]


def as_it_is(x: Tensor) -> Tensor:
    return x


class ImageDataset(ABC):
    """What stages train on. What `pick` gives stands for the pictures of a batch wherever they are asked for."""

    side: int  # the shortest there is, in pixels
    square: bool  # whether all are squares of it
    position = 0  # where to go on reading after the last batch
    fingerprint = ""  # of what is read and how, if that can change

    def start_reading(
        self, position: int, fingerprint: str, *, batch: int, seed: int, cache: Path, rank: int, world: int
    ) -> None:
        """Be ready to read on from a `position` of pictures that had a `fingerprint`: `batch` pictures a time for
        process `rank` of `world`. What is in memory is."""
        self.position = position

    @abstractmethod
    def sample_batch(self, rng: StepRandom) -> Any:
        """The pictures of a batch."""

    @abstractmethod
    def captions(self, picked: Any, rng: StepRandom, drop: float = 0.0) -> list[str]:
        """A wording for each; a share of `drop` is empty."""

    @abstractmethod
    def images(self, picked: Any) -> Tensor:
        """The pictures [B, 3, H, W] in [0, 1]."""

    def must_compute(self, name: str) -> bool:
        """Whether what `each` (or, for "text", `states`) calls by this name has to be computed."""
        return True

    @abstractmethod
    def map_images(self, name: str, compute: Compute, derive: Compute = as_it_is) -> Callable[[Any], Tensor]:
        """What `derive` makes of the `name` of the pictures of a batch: of what `compute` makes of these pictures
        [B, 3, H, W] in [0, 1], or made of them before."""

    def map_captions(self, compute: Callable[[list[str]], Tensor]) -> Callable[[Any, StepRandom, float], Tensor]:
        """What `compute` makes of the `captions` of a batch."""
        return lambda picked, rng, drop: compute(self.captions(picked, rng, drop))

    @abstractmethod
    def preview_images(self) -> InMemoryDataset | None:
        """Returns images for a sample grid, held out from training if possible."""


class InMemoryDataset(ImageDataset):
    """Images [N, 3, H, W] uint8 in memory, all of one size; a batch is their indices."""

    def __init__(self, images: Tensor, texts: Sequence[str] = ()):
        self.pixels, self.texts = images, texts
        self.side, self.square = min(images.shape[-2:]), images.shape[-1] == images.shape[-2]

    def __len__(self) -> int:
        return len(self.pixels)

    def sample_batch(self, rng: StepRandom) -> Tensor:
        """Indices [n] of random pictures, without repetition in a batch where there are enough."""
        return rng.pick(len(self))

    def evenly_spaced(self, count: int) -> Tensor:
        """Indices of up to `count` pictures from all over, for a sheet."""
        return torch.arange(len(self))[:: max(1, len(self) // count)][:count]

    def captions(self, picked: Tensor, rng: StepRandom, drop: float = 0.0) -> list[str]:
        dropped, words = rng.uniform() < drop, map(random.Random, rng.integers(2**31).tolist())
        texts = [self.wording(i, word) for i, word in zip(picked.tolist(), words, strict=True)]
        return ["" if empty else text for empty, text in zip(dropped.tolist(), texts, strict=True)]

    def wording(self, index: int, words: random.Random) -> str:
        """What a picture shows, in words of which `words` may choose."""
        return self.texts[index]

    def images(self, picked: Tensor | slice) -> Tensor:
        return self.pixels[picked].float() / 255

    def map_images(self, name: str, compute: Compute, derive: Compute = as_it_is) -> Callable[[Tensor | slice], Tensor]:
        """It is computed here and now, of all pictures."""
        starts = range(0, len(self), AT_ONCE)
        known = torch.cat([derive(compute(self.images(slice(start, start + AT_ONCE)))) for start in starts])
        return lambda picked: known[picked]

    def preview_images(self) -> InMemoryDataset | None:
        return self
