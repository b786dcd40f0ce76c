"""Where pictures come from, as one interface: what is known of each without reading it, and reading it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

SUFFIXES = ("png", "jpg", "jpeg", "webp", "bmp", "tif", "tiff", "gif")  # of files that are taken for pictures
ENTRY = [("width", "i4"), ("height", "i4"), ("watermark", "f4"), ("aesthetic", "f4"), ("unsafe", "f4")]


def entry(size: tuple[int, int], scores: Mapping[str, float]) -> tuple[float, ...]:
    """A row of `Source.entries`; a score that is not known is NaN."""
    return (*size, *(scores.get(name, math.nan) for name, _ in ENTRY[2:]))


def content(path: Path) -> bytes:
    """A file's; ValueError if it can't be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error


class Source(ABC):
    """Pictures with captions, in an order that stays as long as the files do."""

    entries: np.ndarray  # [N] rows of ENTRY, perhaps with more fields: pixels of the upright picture, and scores
    bad: dict[str, str]  # what was left out because it can't be read, by name: the reason in a sentence

    def __len__(self) -> int:
        return len(self.entries)

    @abstractmethod
    def name(self, index: int) -> str:
        """What a log calls an example: short, and enough to find it."""

    @abstractmethod
    def picture(self, index: int) -> Image.Image:
        """The picture as `open_picture` reads it; raises ValueError with a sentence that names it if it's broken."""

    def kept(self, index: int, names: Sequence[str]) -> dict[str, Tensor]:
        """What a cache keeps of an example, by these names; raises ValueError with a sentence that names the example
        if it can't be read."""
        return {}

    @abstractmethod
    def caption(self, index: int) -> str:
        """The caption; raises ValueError with a sentence that names the example if it has none that can be read."""
