"""The interface of a source: images with captions that can be read in any order."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image
from torch import Tensor

from .left_out import LeftOut

SCORE_KEYS = {  # of JSON tables
    "pwatermark": "watermark", "aesthetic": "aesthetic", "aesthetic_score": "aesthetic", "punsafe": "unsafe"
}  # fmt: skip
RECORD_FIELDS = [
    ("width", "i4"), ("height", "i4"), ("watermark", "f4"), ("aesthetic", "f4"), ("unsafe", "f4"), ("line", "i4")
]  # fmt: skip


def image_record(size: tuple[int, int], table: Mapping[str, Any], name: str, line: int = 0) -> tuple[float, ...]:
    """Returns a row of `ImageSource.records` from an image's size, JSON table and caption; missing scores are NaN.

    ValueError for an integer that no float can hold.
    """
    scores = {field: math.nan for field, _ in RECORD_FIELDS[2:5]}
    for key, value in table.items():
        score = SCORE_KEYS.get(key.lower())
        if score and isinstance(value, int | float) and not isinstance(value, bool):
            try:
                scores[score] = float(value)
            except OverflowError:
                raise ValueError(f"the {key} of {name} is too large: correct or remove it") from None
    return (*size, *scores.values(), line)


def read_bytes(path: Path) -> bytes:
    """Returns the contents of a file; ValueError if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error


def read_at(file: BinaryIO, offset: int, size: int) -> bytes:
    """Returns `size` bytes of a file from `offset` on, fewer at its end."""
    file.seek(offset)
    return file.read(size)


class ImageSource(ABC):
    """Images with captions, in an order that depends on the files alone. An image with n captions is n examples.

    Its methods raise ValueError, naming the image, if a file is damaged or missing.
    """

    # [N] of RECORD_FIELDS and perhaps more: size in pixels after EXIF rotation, scores, and the number of the caption
    records: np.ndarray
    names: list[str]  # [N], short names for the log
    bad: dict[str, str]  # unreadable examples, which have no record: name → reason
    left_out: LeftOut  # files that are no examples

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def origins(self) -> np.ndarray:
        """The number [N] of the `[data]` table's source that each example is from."""
        return np.zeros(len(self), dtype=np.int64)

    @abstractmethod
    def image(self, index: int) -> Image.Image:
        """Returns the image in RGB."""

    @abstractmethod
    def caption(self, index: int) -> str:
        """Returns the caption."""

    def mask(self, index: int, kind: str) -> Image.Image | None:
        """Returns the mask in 8-bit grey; None if there is none. `kind` is one of `MaskConfig.mask`."""
        raise NotImplementedError

    def has_mask(self, index: int, kind: str) -> bool:
        """True if there is a mask, as far as it is known without reading pixels."""
        raise NotImplementedError

    def has_hint(self, index: int) -> bool:
        """True if there is a hint picture."""
        raise NotImplementedError

    def hint(self, index: int) -> Image.Image:
        """Returns the hint picture of a ControlNet in RGB. ValueError if there is none."""
        raise NotImplementedError

    def hint_size(self, index: int) -> tuple[int, int]:
        """Returns the width and height of the hint picture, from its header if possible. ValueError as `hint`, and if
        it has another shape than the image."""
        raise NotImplementedError

    def cached_tensors(self, index: int, names: Sequence[str], mirrored: bool = False) -> dict[str, Tensor]:
        """Returns the cached tensors of an image, or of the mirrored image, by name; only a cache has any."""
        return {}
