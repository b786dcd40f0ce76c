"""Legal picture sizes, and the sizes of each stage's latents."""

from __future__ import annotations

MULTIPLE = 64  # width of one token in Stage B's deepest level, in pixels
LARGEST = 2048


def nearest_legal(side: int) -> int:
    """Returns the legal side, in pixels, nearest to `side`."""
    return min(max(MULTIPLE, (side + MULTIPLE // 2) // MULTIPLE * MULTIPLE), LARGEST)


def check_size(width: int, height: int) -> None:
    """Raises ValueError, naming the nearest legal size, unless both sides are multiples of 64 up to 2048 pixels."""
    legal = nearest_legal(width), nearest_legal(height)
    if (width, height) != legal:
        raise ValueError(
            f"{width}x{height} pixels cannot be generated: both sides must be multiples of {MULTIPLE} "
            f"from {MULTIPLE} to {LARGEST}; the nearest legal size is {legal[0]}x{legal[1]}"
        )


def prior_side(pixels: int) -> int:
    """Returns the side of Stage C latents: pixels / 42.67, rounded up (128 pixels are exactly 3)."""
    return -(-pixels * 3 // 128)


def decoder_side(pixels: int) -> int:
    """Returns the side of Stage A and B latents: pixels / 4."""
    return pixels // 4
