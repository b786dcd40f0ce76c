"""Which pictures are trained on, by their size and the scores that LAION gave them, and in which bucket."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from .buckets import Size, nearest_buckets, same_buckets


@dataclass(frozen=True, kw_only=True)
class Filters:
    """What is left out; every filter is off until it is given. The original's values stand behind each.

    What lacks the score that a filter asks for is left out too, as in the original: a filter that lets pass what it
    knows nothing of would be none. Sizes are those of the file, where the original took those of LAION's table.
    """

    min_side: int | None = None  # pixels of the shorter side: 512
    max_side: int | None = None  # pixels of the longer side: 4096
    max_watermark: float | None = None  # chance of a watermark (pwatermark): 0.5
    min_aesthetic: float | None = None  # aesthetic score, 1 to 10 (AESTHETIC_SCORE, aesthetic): 5.0
    max_unsafe: float | None = None  # chance to be unsafe (punsafe): 0.99

    def __post_init__(self) -> None:
        for name in ("min_side", "max_side"):
            if (side := getattr(self, name)) is not None and side < 1:
                raise ValueError(f"[data] {name} must be at least 1 pixel, got {side}")
        for name in ("max_watermark", "max_unsafe"):
            if (chance := getattr(self, name)) is not None and not 0 <= chance <= 1:
                raise ValueError(f"[data] {name} is a chance, 0 to 1, got {chance:g}")

    def reasons(self, entries: np.ndarray) -> np.ndarray:
        """Why each of the entries [N] is left out, as texts [N]: "" for what stays."""
        shorter = np.minimum(entries["width"], entries["height"])
        longer = np.maximum(entries["width"], entries["height"])
        out = np.full(len(entries), "", dtype="<U32")

        def leave_out(which: np.ndarray, reason: str) -> None:
            out[which & (out == "")] = reason

        if self.min_side is not None:
            leave_out(shorter < self.min_side, "too small")
        if self.max_side is not None:
            leave_out(longer > self.max_side, "too large")
        limits = (
            ("watermark", self.max_watermark, 1, "with a watermark"),
            ("aesthetic", self.min_aesthetic, -1, "of low aesthetic score"),
            ("unsafe", self.max_unsafe, 1, "unsafe"),
        )
        for score, limit, sign, reason in limits:
            if limit is not None:
                leave_out(sign * entries[score] > sign * limit, reason)
                leave_out(np.isnan(entries[score]), f"without {score} score")
        return out


@dataclass(frozen=True)
class Choice:
    """Which pictures are taken, in which sizes (width, height), and what is made of them."""

    filters: Filters
    sizes: tuple[Size, ...]
    enlarge: float = 1.0  # times that a picture may be scaled up
    random_crop: bool = False
    captions: bool = True  # whether one is needed
    images: bool = True  # whether they are
    kept: tuple[str, ...] = ()  # what is taken of a cache

    def of(self, entries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Why each of the entries [N] is left out, "" for what stays, and the bucket of what stays."""
        reasons, reason = self.filters.reasons(entries), "smaller than every bucket"
        if "wide" in (entries.dtype.names or ()):  # of a cache, where it has its size
            buckets, reason = same_buckets(entries, self.sizes), "cached in other sizes"
        else:
            buckets = nearest_buckets(entries, self.sizes, self.enlarge)
        return np.where((reasons == "") & (buckets < 0), reason, reasons), buckets


def left_out(reasons: Counter[str]) -> str:
    """How many were left out and why, as a part of a sentence: "3 unsafe, 12 too small"."""
    return ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()) if reason) or "nothing"
