"""Selects images by their size and LAION scores, and assigns them to buckets."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from PIL import Image
from torch import Tensor

from ...common.dataclass_config import Range
from .buckets import Size, fit, nearest_buckets

Side = Annotated[int | None, Range(least=1)]
Probability = Annotated[float | None, Range(least=0, most=1)]


@dataclass(frozen=True, kw_only=True)
class Filters:
    """Limits on size and scores, all off by default; the comments give the original's values.

    An image without a score fails that score's filter, as in the original. Sizes are the files' own; the original took
    them from LAION's table.
    """

    min_side: Side = None  # pixels of the shorter side: 512
    max_side: Side = None  # pixels of the longer side: 4096
    max_watermark: Probability = None  # probability of a watermark (pwatermark): 0.5
    min_aesthetic: float | None = None  # aesthetic score, 1 to 10 (AESTHETIC_SCORE, aesthetic): 5.0
    max_unsafe: Probability = None  # probability of being unsafe (punsafe): 0.99

    def reasons(self, records: np.ndarray) -> np.ndarray:
        """Returns why each image is rejected, as texts [N]; "" for those that pass."""
        shorter = np.minimum(records["width"], records["height"])
        longer = np.maximum(records["width"], records["height"])
        tests = [(shorter < (self.min_side or 0), "too small"), (longer > (self.max_side or np.inf), "too large")]
        for score, limit, sign, reason in (
            ("watermark", self.max_watermark, 1, "with a watermark"),
            ("aesthetic", self.min_aesthetic, -1, "of low aesthetic score"),
            ("unsafe", self.max_unsafe, 1, "unsafe"),
        ):
            if limit is not None:
                tests.append((sign * records[score] > sign * limit, reason))
                tests.append((np.isnan(records[score]), f"without {score} score"))
        failed, reasons = zip(*tests, strict=True)
        return np.select(failed, reasons, "")  # the first reason counts


@dataclass(frozen=True)
class Selection:
    """Chooses images and their buckets, and says which parts of each to read."""

    filters: Filters
    sizes: tuple[Size, ...]  # of the buckets
    enlarge: float = 1.0  # largest upscaling factor
    random_crop: bool = False
    captions: bool = True  # False: "" instead
    images: bool = True  # False: empty tensors instead
    cached: tuple[str, ...] = ()  # names of the tensors to read from a cache

    def select(self, records: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns why each image is rejected ("" if it is used) and the bucket index of each, both [N]."""
        if "wide" in (records.dtype.names or ()):  # of a cache: its images are cropped already
            match = [(records["wide"] == wide) & (records["high"] == high) for wide, high in self.sizes]
            buckets, reason = np.where(np.any(match, 0), np.argmax(match, 0), -1), "cached in other sizes"
        else:
            buckets, reason = nearest_buckets(records, self.sizes, self.enlarge), "smaller than every bucket"
        reasons = self.filters.reasons(records)
        return np.where((reasons == "") & (buckets < 0), reason, reasons), buckets

    def crop(self, image: Image.Image, bucket: int, *key: int) -> Tensor:
        """Returns an image in its bucket's size, [3, H, W] uint8; the position of a random crop depends on `key`."""
        if not self.random_crop:
            return fit(image, self.sizes[bucket])
        x, y = np.random.default_rng(key).random(2).tolist()
        return fit(image, self.sizes[bucket], (x, y))


def rejected(reasons: Counter[str]) -> str:
    """Returns the counts of rejected images by reason, such as "12 too small, 3 unsafe"."""
    return ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()) if reason) or "nothing"
