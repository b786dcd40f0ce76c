"""The interface of a source: images with captions that can be read in any order."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from .sidecars import read_scores

IMAGE_SUFFIXES = ("png", "jpg", "jpeg", "webp", "bmp", "tif", "tiff", "gif")
RECORD_FIELDS = [("width", "i4"), ("height", "i4"), ("watermark", "f4"), ("aesthetic", "f4"), ("unsafe", "f4")]


def image_record(size: tuple[int, int], table: Mapping[str, Any], name: str) -> tuple[float, ...]:
    """Returns a row of `ImageSource.records` from an image's size and JSON table; missing scores are NaN."""
    scores = read_scores(table, name)
    return (*size, *(scores.get(field, math.nan) for field, _ in RECORD_FIELDS[2:]))


def read_bytes(path: Path) -> bytes:
    """Returns the contents of a file; ValueError if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error


class ImageSource(ABC):
    """Images with captions, in an order that depends on the files alone.

    Reading methods raise ValueError, naming the image, for what is damaged or missing.
    """

    records: np.ndarray  # [N], RECORD_FIELDS and perhaps more: size in pixels after EXIF rotation, and scores
    names: list[str]  # [N], short names for the log
    bad: dict[str, str]  # unreadable examples, which have no record: name → reason

    def __len__(self) -> int:
        return len(self.names)

    @abstractmethod
    def image(self, index: int) -> Image.Image:
        """Returns the image in RGB."""

    @abstractmethod
    def caption(self, index: int) -> str:
        """Returns the caption."""

    def cached_tensors(self, index: int, names: Sequence[str]) -> dict[str, Tensor]:
        """Returns tensors of a cache by name; a source that is no cache has none."""
        return {}
