"""Selects images by their size and LAION scores, and assigns them to buckets."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from .buckets import Size, cached_buckets, nearest_buckets


@dataclass(frozen=True, kw_only=True)
class Filters:
    """Limits on size and scores, all off by default; the comments give the original's values.

    An image without a score fails that score's filter, as in the original. Sizes are the files' own; the original took
    them from LAION's table.
    """

    min_side: int | None = None  # pixels of the shorter side: 512
    max_side: int | None = None  # pixels of the longer side: 4096
    max_watermark: float | None = None  # probability of a watermark (pwatermark): 0.5
    min_aesthetic: float | None = None  # aesthetic score, 1 to 10 (AESTHETIC_SCORE, aesthetic): 5.0
    max_unsafe: float | None = None  # probability of being unsafe (punsafe): 0.99

    def __post_init__(self) -> None:
        for name in ("min_side", "max_side"):
            if (side := getattr(self, name)) is not None and side < 1:
                raise ValueError(f"[data] {name} must be at least 1 pixel, got {side}")
        for name in ("max_watermark", "max_unsafe"):
            if (limit := getattr(self, name)) is not None and not 0 <= limit <= 1:
                raise ValueError(f"[data] {name} must be 0 to 1, got {limit:g}")

    def reasons(self, records: np.ndarray) -> np.ndarray:
        """Returns why each image is rejected, as texts [N]; "" for those that pass."""
        shorter = np.minimum(records["width"], records["height"])
        longer = np.maximum(records["width"], records["height"])
        tests = []
        if self.min_side is not None:
            tests.append((shorter < self.min_side, "too small"))
        if self.max_side is not None:
            tests.append((longer > self.max_side, "too large"))
        for score, limit, sign, reason in (
            ("watermark", self.max_watermark, 1, "with a watermark"),
            ("aesthetic", self.min_aesthetic, -1, "of low aesthetic score"),
            ("unsafe", self.max_unsafe, 1, "unsafe"),
        ):
            if limit is not None:
                tests.append((sign * records[score] > sign * limit, reason))
                tests.append((np.isnan(records[score]), f"without {score} score"))
        out = np.full(len(records), "", dtype="<U32")
        for failed, reason in reversed(tests):  # the first reason counts
            out[failed] = reason
        return out


@dataclass(frozen=True)
class Selection:
    """Which images are used, in which sizes, and what is read of each."""

    filters: Filters
    sizes: tuple[Size, ...]  # of the buckets
    enlarge: float = 1.0  # largest factor of upscaling
    random_crop: bool = False
    captions: bool = True  # False: not needed, "" instead
    images: bool = True  # False: not needed, empty tensors instead
    cached: tuple[str, ...] = ()  # tensors to read from a cache

    def select(self, records: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns why each image is rejected ("" if it is used) and the bucket index of each, both [N]."""
        if "wide" in (records.dtype.names or ()):
            buckets, reason = cached_buckets(records, self.sizes), "cached in other sizes"
        else:
            buckets, reason = nearest_buckets(records, self.sizes, self.enlarge), "smaller than every bucket"
        reasons = self.filters.reasons(records)
        return np.where((reasons == "") & (buckets < 0), reason, reasons), buckets


def rejected(reasons: Counter[str]) -> str:
    """Returns the counts of rejected images by reason, such as "12 too small, 3 unsafe"."""
    return ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()) if reason) or "nothing"
