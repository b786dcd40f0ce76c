"""Aspect-ratio buckets: pictures of like shape are trained on together, in a size that suits their shape."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ...common.geometry import LARGEST

Size = tuple[int, int]  # width, height in pixels


def bucket_sizes(side: int, ratio: float, multiple: int) -> tuple[Size, ...]:
    """The sizes of about side² pixels, and never more, whose longer side is up to `ratio` times the shorter one.

    Sides are multiples of `multiple`: at 128, both latents of Stage C and of Stage B fill the picture exactly.
    """
    found = set()
    for short in range(multiple, side + 1, multiple):
        long = min(side * side // short // multiple * multiple, LARGEST)
        if short <= long <= ratio * short:
            found |= {(short, long), (long, short)}
    return tuple(sorted(found))


def nearest_buckets(entries: np.ndarray, buckets: tuple[Size, ...], enlarge: float) -> np.ndarray:
    """The bucket of each of the entries [N], as indices [N]; -1 is one too small for all of them.

    It is the nearest in log aspect ratio among those that a picture covers when scaled up no more than `enlarge`
    times; of buckets equally near the larger one.
    """
    width, height = entries["width"].astype(float), entries["height"].astype(float)
    aspect = np.log(width / height)
    best, nearest = np.full(len(entries), -1), np.full(len(entries), np.inf)
    for bucket in sorted(range(len(buckets)), key=lambda i: buckets[i][0] * buckets[i][1], reverse=True):
        wide, high = buckets[bucket]
        distance = np.abs(aspect - np.log(wide / high))
        covered = np.maximum(wide / width, high / height) <= enlarge + 1e-6
        better = covered & (distance < nearest - 1e-6)
        best[better], nearest[better] = bucket, distance[better]
    return best


def same_buckets(entries: np.ndarray, buckets: tuple[Size, ...]) -> np.ndarray:
    """The bucket of the size in which each of a cache's entries [N] is kept, as indices [N]; -1 is one of none."""
    out = np.full(len(entries), -1)
    for bucket, (wide, high) in enumerate(buckets):
        out[(entries["wide"] == wide) & (entries["high"] == high)] = bucket
    return out


def fit(picture: Image.Image, size: Size, centre: tuple[float, float] = (0.5, 0.5)) -> Tensor:
    """A picture in RGB scaled to cover a size and cropped, as [3, height, width] uint8.

    `centre` says where in the room that is left the crop lies, from 0 (left, top) to 1.
    """
    fitted = ImageOps.fit(picture, size, Image.Resampling.LANCZOS, centering=centre)
    return torch.from_numpy(np.array(fitted)).permute(2, 0, 1).contiguous()
