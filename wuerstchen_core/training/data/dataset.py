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

CHUNK = 32  # images in one forward pass of a frozen network

Compute: TypeAlias = Callable[[Tensor], Tensor]


def identity(x: Tensor) -> Tensor:
    return x


class ImageDataset(ABC):
    """Training images with captions.

    `sample_batch` returns a handle of one batch, from which the other methods read images, captions and tensors.
    """

    side: int  # pixels of the shortest side of any image
    square: bool  # True if all images are squares of that side
    position = 0  # where reading resumes after the last batch
    fingerprint = ""  # of the images and how they are read, if they can change

    def start_reading(
        self, position: int, fingerprint: str, *, batch: int, seed: int, cache: Path, rank: int, world: int
    ) -> None:
        """Prepares for `batch` images a step for process `rank` of `world`.

        `position` and `fingerprint` are those of the run to resume, or 0 and "". Images in memory need neither.
        """
        self.position = position

    @abstractmethod
    def sample_batch(self, rng: StepRandom) -> Any:
        """Returns the handle of the next batch."""

    @abstractmethod
    def captions(self, batch: Any, rng: StepRandom, drop: float = 0.0) -> list[str]:
        """Returns a caption for each image; a fraction of `drop` is empty."""

    @abstractmethod
    def images(self, batch: Any) -> Tensor:
        """Returns the images [B, 3, H, W] in [0, 1]."""

    def must_compute(self, name: str) -> bool:
        """True unless a cache has the tensors of this name: "latents", "features" or "text"."""
        return True

    @abstractmethod
    def map_images(self, name: str, compute: Compute, derive: Compute = identity) -> Callable[[Any], Tensor]:
        """Returns a function that maps a batch to `derive(compute(images))`, images [B, 3, H, W] in [0, 1].

        The result of `compute` is read from a cache instead if one has `name`.
        """

    def map_captions(self, compute: Callable[[list[str]], Tensor]) -> Callable[[Any, StepRandom, float], Tensor]:
        """Returns a function that maps a batch, rng and drop to `compute(captions)`, or reads it from a cache."""
        return lambda batch, rng, drop: compute(self.captions(batch, rng, drop))

    @abstractmethod
    def preview_images(self) -> InMemoryDataset | None:
        """Returns images for a sample grid, held out from training if possible; None if there are none."""


class InMemoryDataset(ImageDataset):
    """Images [N, 3, H, W] uint8 of one size in memory; the handle of a batch is their indices [B]."""

    def __init__(self, pixels: Tensor, texts: Sequence[str] = ()):
        self.pixels, self.texts = pixels, texts
        self.side, self.square = min(pixels.shape[-2:]), pixels.shape[-1] == pixels.shape[-2]

    def __len__(self) -> int:
        return len(self.pixels)

    def sample_batch(self, rng: StepRandom) -> Tensor:
        """Returns random indices, without repetition if there are enough images."""
        return rng.pick(len(self))

    def evenly_spaced(self, count: int) -> Tensor:
        """Returns the indices of up to `count` images from the whole range."""
        return torch.arange(len(self))[:: max(1, len(self) // count)][:count]

    def captions(self, batch: Tensor, rng: StepRandom, drop: float = 0.0) -> list[str]:
        dropped, seeds = (rng.uniform() < drop).tolist(), rng.integers(2**31).tolist()
        texts = [self.caption(i, random.Random(seed)) for i, seed in zip(batch.tolist(), seeds, strict=True)]
        return ["" if empty else text for empty, text in zip(dropped, texts, strict=True)]

    def caption(self, index: int, words: random.Random) -> str:
        """Returns the caption of an image; `words` chooses between wordings."""
        return self.texts[index]

    def images(self, batch: Tensor | slice) -> Tensor:
        return self.pixels[batch].float() / 255

    def map_images(self, name: str, compute: Compute, derive: Compute = identity) -> Callable[[Tensor | slice], Tensor]:
        """Computes the tensors of all images at once, here."""
        starts = range(0, len(self), CHUNK)
        tensors = torch.cat([derive(compute(self.images(slice(start, start + CHUNK)))) for start in starts])
        return lambda batch: tensors[batch]

    def preview_images(self) -> InMemoryDataset | None:
        return self
