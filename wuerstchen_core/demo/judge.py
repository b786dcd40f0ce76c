"""A judge of generated pictures that is no trained network: does a picture show what was asked?

A picture is compared with the true drawing of every thing on the asked background and at the
asked size, by colour (OKLab, Ottosson 2020) and by edges (histograms of oriented gradients,
Dalal and Triggs 2005). A thing counts as shown only if its true drawing is the nearest, nearer
than any drawing of another size, than strongly blurred drawings and than the bare background.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageFilter

from .artwork import CANVAS, draw_all
from .vocabulary import COLOURS, SIZES, THINGS, Scene

NOTHING = -1  # the answer when no thing, or no known background, is there

_WORK = 64  # pixels per side at which pictures are compared
_SHIFT = 2  # work pixels that a thing may be off its place, each way (8 of 256)
_CELL = 8  # work pixels per side of a gradient histogram
_BINS = 9  # orientations over half a turn
_EDGE_FLOOR = 0.02  # mean gradient of a cell below which edges count for less: blur, noise
_BLOB_SIGMA = 4.0  # work pixels (16 of 256): the blur that turns a drawing into a blob
_BORDER = 2  # work pixels: a border this wide is clear of every drawing
_BORDER_LIMIT = 0.07  # OKLab; the backgrounds are at least twice as far from each other

# sRGB to OKLab, https://bottosson.github.io/posts/oklab/
_TO_LMS = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ],
    dtype=np.float32,
)
_TO_LAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ],
    dtype=np.float32,
)


def oklab(rgb: np.ndarray) -> np.ndarray:
    """sRGB 0..255 [..., 3] to OKLab float32 [..., 3]: lightness 0..1, two colour axes."""
    value = np.asarray(rgb, dtype=np.float32) / 255.0
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    return np.cbrt(linear @ _TO_LMS.T) @ _TO_LAB.T


def _checked(image: np.ndarray, canvas: int) -> np.ndarray:
    image = np.asarray(image)
    if image.shape != (canvas, canvas, 3) or image.dtype != np.uint8:
        raise ValueError(f"expected a uint8 picture [{canvas}, {canvas}, 3], got {image.dtype} {image.shape}")
    return image


def _reduced(image: np.ndarray) -> np.ndarray:
    """A uint8 picture [H, H, 3] averaged down to float32 [_WORK, _WORK, 3]."""
    step = len(image) // _WORK
    rows = image.reshape(_WORK, step, -1).sum(axis=1, dtype=np.float32)
    return rows.reshape(_WORK, _WORK, step, 3).sum(axis=2) / step**2


def _shifts(field: np.ndarray, reach: int) -> np.ndarray:
    """Every shift of [H, W, D] by up to `reach`, edges repeated: [shifts, H, W, D]."""
    height, width = field.shape[:2]
    padded = np.pad(field, ((reach, reach), (reach, reach), (0, 0)), mode="edge")
    offsets = range(2 * reach + 1)
    return np.stack([padded[y : y + height, x : x + width] for y in offsets for x in offsets])


def _oriented_gradients(lab: np.ndarray) -> np.ndarray:
    """Gradient strength by orientation, [H, W, 3] to [H, W, _BINS]; the strongest axis counts."""
    down, right = np.gradient(lab, axis=(0, 1))
    strength = np.hypot(down, right)
    axis = strength.argmax(axis=-1)[..., None]
    down, right, strength = (np.take_along_axis(part, axis, axis=-1)[..., 0] for part in (down, right, strength))
    position = (np.arctan2(down, right) % np.pi) / np.pi * _BINS  # shared by two nearest bins
    distance = np.abs(position[..., None] - np.arange(_BINS))
    distance = np.minimum(distance, _BINS - distance)
    return strength[..., None] * np.maximum(1.0 - distance, 0.0).astype(np.float32)


def _features(image: np.ndarray, reach: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Colours [shifts, C] and edges [shifts, E] of a reduced picture, for shifts up to `reach`."""
    lab = oklab(image)
    colours = _shifts(lab, reach)
    gradients = _shifts(_oriented_gradients(lab), reach)
    count, cells, half = len(gradients), _WORK // _CELL, _WORK // 2
    colours = colours.reshape(count, half, 2, half, 2, 3).mean(axis=(2, 4))  # judged at half size
    cell_shape = (count, cells, _CELL, cells, _CELL, _BINS)
    histograms = gradients.reshape(cell_shape).mean(axis=(2, 4))  # [shifts, cells, cells, bins]
    norm = np.sqrt((histograms**2).sum(axis=-1, keepdims=True) + _EDGE_FLOOR**2)
    return colours.reshape(count, -1), (histograms / norm).reshape(count, -1)


def _squared_distances(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """[N, F] and [M, F] to the mean squared differences [N, M]."""
    squares = (rows**2).sum(axis=1)[:, None] + (columns**2).sum(axis=1)
    return np.maximum(squares - 2.0 * rows @ columns.T, 0.0) / rows.shape[1]


@dataclass(frozen=True)
class _References:
    """What a picture can be nearest to: every thing, then what is not a thing as asked."""

    colours: np.ndarray
    edges: np.ndarray
    colour_scale: float
    edge_scale: float

    def distances(self, image: np.ndarray) -> np.ndarray:
        """Distance to every reference at its best shift; 1 is typical of two different things."""
        colours, edges = _features(_reduced(image), _SHIFT)
        by_colour = _squared_distances(colours, self.colours) / self.colour_scale
        by_edge = _squared_distances(edges, self.edges) / self.edge_scale
        return ((by_colour + by_edge) / 2).min(axis=0)


def _all_features(pictures: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Colours [N, C] and edges [N, E] of reduced pictures, not shifted."""
    colours, edges = zip(*map(_features, pictures), strict=True)
    return np.concatenate(colours), np.concatenate(edges)


@cache
def _drawings(colour: int, size: int, canvas: int) -> list[np.ndarray]:
    return [_reduced(draw_all([Scene(thing, colour, size)], canvas)[0]) for thing in range(len(THINGS))]


@cache
def _drawing_features(colour: int, size: int, canvas: int) -> tuple[np.ndarray, np.ndarray]:
    return _all_features(_drawings(colour, size, canvas))


def _blob(drawing: np.ndarray) -> np.ndarray:
    picture = Image.fromarray(np.rint(drawing).astype(np.uint8))
    return np.asarray(picture.filter(ImageFilter.GaussianBlur(_BLOB_SIGMA)))


def _spread(features: np.ndarray) -> float:
    """Mean squared distance of two different rows."""
    different = ~np.eye(len(features), dtype=bool)
    return float(_squared_distances(features, features)[different].mean())


@cache
def _references(colour: int, size: int, canvas: int) -> _References:
    asked = _drawing_features(colour, size, canvas)
    wrong = [_drawing_features(colour, k, canvas) for k in range(len(SIZES)) if k != size]
    drawings = _drawings(colour, size, canvas)
    bare = np.broadcast_to(drawings[0][0, 0], drawings[0].shape)
    wrong.append(_all_features([*map(_blob, drawings), bare]))
    colours, edges = map(np.concatenate, zip(asked, *wrong, strict=True))
    return _References(colours, edges, *map(_spread, asked))


class Judge:
    """Names the thing and the background of square pictures of `canvas` pixels.

    The true drawings of a background and size are made at their first use and kept.
    """

    def __init__(self, canvas: int = CANVAS):
        if canvas < _WORK or canvas % _WORK:
            raise ValueError(f"canvas must be a multiple of {_WORK} pixels, got {canvas}")
        self.canvas = canvas
        self._backgrounds = oklab(np.array(list(COLOURS.values())))

    def distances(self, image: np.ndarray, colour: int, size: int) -> np.ndarray:
        """Distance [things] of a uint8 picture to every thing on that background, at that size."""
        return self._all_distances(image, colour, size)[: len(THINGS)]

    def thing_ranks(self, image: np.ndarray, colour: int, size: int) -> np.ndarray:
        """The things' indices [things], nearest first, however far."""
        return np.argsort(self.distances(image, colour, size), kind="stable")

    def identify(self, image: np.ndarray, colour: int, size: int) -> int:
        """The index of the thing shown at that size, or -1: a blob, another size, or nothing."""
        nearest = int(self._all_distances(image, colour, size).argmin())
        return nearest if nearest < len(THINGS) else NOTHING

    def background(self, image: np.ndarray) -> int:
        """The index of the colour of the border, or -1 where the border is far from all."""
        lab = oklab(_reduced(_checked(image, self.canvas)))
        border = np.ones(lab.shape[:2], dtype=bool)
        border[_BORDER:-_BORDER, _BORDER:-_BORDER] = False
        offsets = lab[border][:, None] - self._backgrounds  # [pixels, colours, 3]
        distances = np.sqrt((offsets**2).sum(axis=-1)).mean(axis=0)
        nearest = int(distances.argmin())
        return nearest if distances[nearest] <= _BORDER_LIMIT else NOTHING

    def _all_distances(self, image: np.ndarray, colour: int, size: int) -> np.ndarray:
        if not (0 <= colour < len(COLOURS) and 0 <= size < len(SIZES)):
            raise ValueError(f"no background {colour} or no size {size} in the vocabulary")
        return _references(colour, size, self.canvas).distances(_checked(image, self.canvas))


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of two uint8 pictures; infinite when they are equal."""
    a, b = np.asarray(a), np.asarray(b)
    if a.shape != b.shape or a.dtype != np.uint8 or b.dtype != np.uint8:
        raise ValueError(f"expected uint8 pictures of one shape, got {a.dtype} {a.shape}, {b.dtype} {b.shape}")
    error = float(np.mean((a.astype(np.float64) - b) ** 2))
    return 10.0 * math.log10(255.0**2 / error) if error else math.inf


def wilson_interval(successes: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson score interval of a proportion; z = 1.96 for 95 %."""
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"expected 0 <= successes <= n with n >= 1, got {successes} of {n}")
    share, spread = successes / n, z * z / n
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / n + spread / (4 * n))
    return max(0.0, centre - half), min(1.0, centre + half)
