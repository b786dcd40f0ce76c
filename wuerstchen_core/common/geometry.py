"""Legal picture sizes, the sizes of each stage's latents, and boxes in pictures."""

from __future__ import annotations

import math
from typing import TypeAlias

from .numbers import to_int

Box: TypeAlias = tuple[int, int, int, int]  # left, top, width and height in pixels

MULTIPLE = 64  # width of one token in Stage B's deepest level, in pixels
LARGEST = 2048


def nearest_legal(side: int) -> int:
    """Returns the legal side, in pixels, nearest to `side`."""
    return min(max(MULTIPLE, (side + MULTIPLE // 2) // MULTIPLE * MULTIPLE), LARGEST)


def check_size(width: int, height: int) -> None:
    """Raises ValueError, naming the nearest legal size, unless both sides are multiples of 64 up to 2048 pixels."""
    width, height = to_int("width", width), to_int("height", height)
    legal = nearest_legal(width), nearest_legal(height)
    if (width, height) != legal:
        raise ValueError(
            f"{width}x{height} pixels cannot be generated: both sides must be multiples of {MULTIPLE} "
            f"from {MULTIPLE} to {LARGEST}; the nearest legal size is {legal[0]}x{legal[1]}"
        )


def prior_side(pixels: int) -> int:
    """Returns the side of Stage C latents: pixels / 42.67, rounded up (128 pixels are exactly 3)."""
    return -(-pixels * 3 // 128)


def size_note(trained: tuple[float, float], height: int, width: int) -> str | None:
    """Returns a sentence if Stage C latents are of a size that a model was not trained for, else None.

    `trained` are the least and the largest side of its square training images, in pixels. A quarter more or less is
    sound, in any aspect ratio of that area.
    """
    low, high = trained
    side = math.sqrt(height * width) * 128 / 3
    if low * 0.8 <= side <= high * 1.25:
        return None
    sizes = " to ".join(f"{x}x{x}" for x in dict.fromkeys((round(low), round(high))))
    return (
        f"this model was trained on images of about {sizes} pixels: at about {round(width * 128 / 3)}x"
        f"{round(height * 128 / 3)} things are repeated or distorted, so generate at another size"
    )


def decoder_side(pixels: int) -> int:
    """Returns the side of Stage A and B latents: pixels / 4."""
    return pixels // 4
