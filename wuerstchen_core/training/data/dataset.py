"""The interface of training images to the stages, and its implementations for images chosen by index."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ...common.geometry import Box
from ..rng import StepRandom
from .caption_tokens import CaptionTokenizer, Tokens, pad_states
from .held_out import NO_VALIDATION

CHUNK = 32  # images in one forward pass of a frozen network

Compute: TypeAlias = Callable[[Tensor], Tensor]


def identity(x: Tensor) -> Tensor:
    return x


class ImageDataset(ABC):
    """Training images with captions.

    `sample_batch` returns a handle of one batch, which the other methods turn into images, captions and tensors.
    """

    side: int  # shortest side of any image, in pixels
    square: bool  # True if all images are squares of that side
    size: tuple[int, int]  # width and height in pixels of the images that are nearest to squares
    examples = 0  # pairs of image and caption to train on; 0 if it is unknown, as for streams
    position = 0  # to resume from after the last batch
    fingerprint = ""  # hash of the images and of how they are read; "" if they cannot change
    trigger_words: Sequence[str] = ()  # that captions are given
    tokenizer = CaptionTokenizer()
    validation = NO_VALIDATION
    weighted = False  # True if the losses of some images have other weights than 1
    masked = False  # True if masks weight the losses of some images
    pictures = 0  # different images to train on; 0 if it is unknown
    held_out = 0  # number of examples that are held out for validation
    has_boxes = False  # True if the places of things are known

    def start_reading(
        self, position: int, fingerprint: str, *, batch: int, seed: int, cache: Path, rank: int, world: int
    ) -> None:
        """Prepares for reading batches of `batch` images in process `rank` of `world`. Images in memory need nothing.

        `position` and `fingerprint` are those of the run to resume, or 0 and ""; `cache` is a folder for index files.
        """
        self.position = position

    @abstractmethod
    def sample_batch(self, rng: StepRandom) -> Any:
        """Returns the handle of the next batch."""

    def held_out_batches(self, size: int) -> Iterator[tuple[int, Any, int]]:
        """Yields the held-out examples: the number of a batch's first one, its handle and its size, at most `size`."""
        return iter(())

    @abstractmethod
    def captions(self, batch: Any, rng: StepRandom, drop: float = 0.0) -> list[str]:
        """Returns a caption for each image, which is "" with probability `drop`."""

    @abstractmethod
    def images(self, batch: Any) -> Tensor:
        """Returns the images [B, 3, H, W] in [0, 1]."""

    def read_images(self, purpose: str, given_hints: bool = False) -> None:
        """Makes `images` available for a purpose, such as "hints", also beside cached tensors, and `given_hints` too if
        wanted. ValueError if there can be none."""
        if given_hints:
            raise ValueError(
                '[control] hints = "given" needs pictures with hint pictures beside them: name their folder as source '
                "under [data]"
            )

    def given_hints(self, batch: Any) -> Tensor:
        """Returns the hint pictures [B, 3, H, W] in [0, 1] beside the images of a batch."""
        raise NotImplementedError

    def boxes(self, batch: Any) -> list[list[Box]]:
        """Returns the boxes of the things in each image, in the order of its caption."""
        raise NotImplementedError

    def loss_weights(self, batch: Any) -> Tensor | None:
        """Returns factors of the losses of a batch's images: [B, 1, H, W] in pixels if the dataset is `masked`, else
        [B, 1, 1, 1] if it is `weighted`, else None."""
        return None

    def must_compute(self, name: str) -> bool:
        """True unless a cache contains `name`: "latents", "features" or "text"."""
        return True

    @abstractmethod
    def map_images(self, name: str, compute: Compute, derive: Compute = identity) -> Callable[[Any], Tensor]:
        """Returns a function that maps a batch to `derive(compute(images))` of its images [B, 3, H, W] in [0, 1].

        If a cache contains `name`, the result of `compute` is read from it instead.
        """

    def map_captions(
        self, compute: Callable[[list[Tokens]], list[Tensor]]
    ) -> Callable[[Any, StepRandom, float], tuple[Tensor, Tensor | None]]:
        """Returns a function that maps a batch, rng and drop to the states of its captions, padded by `pad_states`.

        `compute` returns the states [77 n, c] of tokens. If a cache contains them, they are read from it instead.
        """
        return lambda batch, rng, drop: pad_states(compute(self.tokenizer(self.captions(batch, rng, drop))))

    def first_captions(self, count: int) -> list[tuple[str, str]]:
        """Returns names of images of the next batch and their captions as they are read; [] if that is unknown."""
        return []

    @abstractmethod
    def preview_images(self) -> IndexedDataset | None:
        """Returns images for sample grids, held out from training if possible; None if there are none."""

    def missing_previews(self) -> str:
        """Returns which images `preview_images` would need, "" if it returns some."""
        return ""


class IndexedDataset(ImageDataset):
    """Images of one size, each with one caption at a time; the handle of a batch is their indices [B]."""

    @abstractmethod
    def __len__(self) -> int:
        """Returns the number of images."""

    def sample_batch(self, rng: StepRandom) -> Tensor:
        """Returns random indices [B], without repetition if there are enough images."""
        return rng.pick(len(self))

    def evenly_spaced(self, count: int) -> Tensor:
        """Returns the indices of up to `count` images, spread over all of them."""
        return torch.arange(len(self))[:: max(1, len(self) // count)][:count]

    def captions(self, batch: Tensor, rng: StepRandom, drop: float = 0.0) -> list[str]:
        dropped, seeds = (rng.uniform() < drop).tolist(), rng.integers(2**31).tolist()
        chosen = zip(batch.tolist(), seeds, dropped, strict=True)
        return ["" if empty else self.caption(index, random.Random(seed)) for index, seed, empty in chosen]

    @abstractmethod
    def caption(self, index: int, words: random.Random) -> str:
        """Returns the caption of an image; `words` are the random numbers to choose a wording."""

    @abstractmethod
    def images(self, batch: Tensor | slice) -> Tensor: ...

    def map_images(self, name: str, compute: Compute, derive: Compute = identity) -> Callable[[Tensor | slice], Tensor]:
        """Computes the tensors of all images now, and returns a function that looks them up."""
        starts = range(0, len(self), CHUNK)
        tensors = torch.cat([derive(compute(self.images(slice(start, start + CHUNK)))) for start in starts])
        return lambda batch: tensors[batch]


class InMemoryDataset(IndexedDataset):
    """Images [N, 3, H, W] uint8 in memory, with hint pictures of the same form."""

    def __init__(self, pixels: Tensor, texts: Sequence[str] = (), hints: Tensor | None = None):
        self.pixels, self.texts, self.hints = pixels, texts, hints
        self.side, self.square = min(pixels.shape[-2:]), pixels.shape[-1] == pixels.shape[-2]
        self.size = pixels.shape[-1], pixels.shape[-2]
        self.examples = len(pixels)

    def __len__(self) -> int:
        return len(self.pixels)

    def caption(self, index: int, words: random.Random) -> str:
        return self.texts[index]

    def images(self, batch: Tensor | slice) -> Tensor:
        return self.pixels[batch].float() / 255

    def given_hints(self, batch: Tensor) -> Tensor:
        assert self.hints is not None
        return self.hints[batch].float() / 255

    def preview_images(self) -> IndexedDataset | None:
        return self
