"""Aspect-ratio buckets: images of similar shape are scaled and cropped to one size and batched together."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from ...common.geometry import LARGEST

Size = tuple[int, int]  # width, height in pixels


def bucket_sizes(side: int, ratio: float, multiple: int) -> tuple[Size, ...]:
    """Returns the sizes of at most about side² pixels whose longer side is up to `ratio` times the shorter one.

    Sides are multiples of `multiple`; with 128 the latents of Stages B and C cover the image exactly.
    """
    sizes = set()
    for short in range(multiple, side + 1, multiple):
        long = min(side * side // short // multiple * multiple, LARGEST)
        if short <= long <= ratio * short:
            sizes |= {(short, long), (long, short)}
    return tuple(sorted(sizes))


def nearest_buckets(records: np.ndarray, buckets: tuple[Size, ...], enlarge: float) -> np.ndarray:
    """Returns the bucket index of each image [N]; -1 if the image is too small for all buckets.

    It is the nearest bucket in log aspect ratio among those that the image covers when scaled up at most `enlarge`
    times; of equally near buckets the largest.
    """
    width, height = records["width"].astype(float), records["height"].astype(float)
    aspect = np.log(width / height)
    best, nearest = np.full(len(records), -1), np.full(len(records), np.inf)
    for bucket in sorted(range(len(buckets)), key=lambda i: buckets[i][0] * buckets[i][1], reverse=True):
        wide, high = buckets[bucket]
        distance = np.abs(aspect - np.log(wide / high))
        covered = np.maximum(wide / width, high / height) <= enlarge + 1e-6
        better = covered & (distance < nearest - 1e-6)
        best[better], nearest[better] = bucket, distance[better]
    return best


def most_square(sizes: Iterable[Size]) -> Size:
    """Returns the size whose sides differ least in ratio; of several, the first."""
    return min(sizes, key=lambda size: max(size) / min(size))
