"""A judge of generated pictures that is no trained network: does a picture show what was asked, and where?

Around the place of each asked thing a picture is compared with the true drawing of every thing on the asked background,
by colour (OKLab, Ottosson 2020) and by edges (histograms of oriented gradients, Dalal and Triggs 2005). A thing counts
as shown only if its true drawing is the nearest, nearer than any drawing of another size, than strongly blurred
drawings and than the bare background, and if the rest of the picture is of one colour: it is whole and alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product

import numpy as np
from PIL import Image, ImageFilter

from wuerstchen_core.demo.artwork import CANVAS, boxes, draw_all
from wuerstchen_core.demo.vocabulary import COLOURS, SHAPES, SIZES, THINGS, Scene

NOTHING = -1  # the answer when no thing, or no known background, is there

_WORK = 64  # pixels of the shorter side at which pictures are compared
_DRAWN = 128  # pixels per side of the true drawings, averaged down to that
_SHIFT = 2  # work pixels that a thing may be off its place, each way (8 of 256)
_CELL = 8  # work pixels per side of a gradient histogram
_BLOCK = 2  # work pixels per side of what is one colour
_BINS = 9  # orientations over half a turn
_EDGE_FLOOR = 0.02  # mean gradient of a cell below which edges count for less: blur, noise
_BLOB_SIGMA = 4.0  # work pixels (16 of 256): the blur that turns a drawing into a blob
_BORDER = 2  # work pixels: a border this wide is clear of every drawing
_BORDER_LIMIT = 0.07  # OKLab; the backgrounds are at least twice as far from each other
_STRAY_LIMIT = 0.07  # OKLab: what is farther from the colour of the rest is not background
_STRAYS = 16  # work pixels of the rest that may be so: a patch of 16 x 16 of 256

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


def _reduced(image: np.ndarray) -> np.ndarray:
    """A uint8 picture [H, W, 3] averaged down to OKLab float32, `_WORK` pixels on its shorter side."""
    step = min(image.shape[:2]) // _WORK
    height, width = (side // step for side in image.shape[:2])
    rows = image.reshape(height, step, -1).sum(axis=1, dtype=np.float32)
    return oklab(rows.reshape(height, width, step, 3).sum(axis=2) / step**2)


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


def _means(field: np.ndarray, edge: int) -> np.ndarray:
    """The mean of every square of that edge, [H, W, D] to [H - edge + 1, W - edge + 1, D]."""
    for _ in range(2):  # downwards, and again with rows and columns swapped
        sums = np.pad(field.cumsum(axis=0), ((1, 0), (0, 0), (0, 0)))
        field = ((sums[edge:] - sums[:-edge]) / edge).swapaxes(0, 1)
    return field


def _features(view: np.ndarray, box: tuple[int, int, int], reach: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Colours [shifts, C] and edges [shifts, E] around a box of a view [H, W, 3], for shifts up to `reach`.

    The window that is looked at is the box, made wider to whole cells; beyond the view its edges are repeated.
    """
    column, row, edge = box
    window = edge + -edge % (4 * _CELL)
    before, side = (window - edge) // 2 + reach + 1, window + 2 * reach + 2  # one more all around, for gradients
    padded = np.pad(view, ((before, before + 1), (before, before + 1), (0, 0)), mode="edge")
    area = padded[row : row + side, column : column + side]
    colours = _means(area[1:-1, 1:-1], _BLOCK)
    histograms = _means(_oriented_gradients(area)[1:-1, 1:-1], _CELL)
    histograms = histograms / np.sqrt((histograms**2).sum(axis=-1, keepdims=True) + _EDGE_FLOOR**2)

    def shifted(means: np.ndarray, step: int) -> np.ndarray:
        shifts = product(range(2 * reach + 1), repeat=2)
        return np.stack([means[y : y + window : step, x : x + window : step].ravel() for y, x in shifts])

    return shifted(colours, _BLOCK), shifted(histograms, _CELL)


def _squared_distances(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """[N, F] and [M, F] to the mean squared differences [N, M]."""
    squares = (rows**2).sum(axis=1)[:, None] + (columns**2).sum(axis=1)
    return np.maximum(squares - 2.0 * rows @ columns.T, 0.0) / rows.shape[1]


@dataclass(frozen=True)
class _References:
    """What a place can be nearest to: every thing, then what is not a thing as asked."""

    colours: np.ndarray
    edges: np.ndarray
    colour_scale: float
    edge_scale: float

    def distances(self, view: np.ndarray, box: tuple[int, int, int]) -> np.ndarray:
        """Distance to every reference at its best shift; 1 is typical of two different things."""
        colours, edges = _features(view, box, _SHIFT)
        by_colour = _squared_distances(colours, self.colours) / self.colour_scale
        by_edge = _squared_distances(edges, self.edges) / self.edge_scale
        return ((by_colour + by_edge) / 2).min(axis=0)


def _blob(drawing: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(drawing).filter(ImageFilter.GaussianBlur(_BLOB_SIGMA * _DRAWN / _WORK)))


def _spread(features: np.ndarray) -> float:
    """Mean squared distance of two different rows."""
    different = ~np.eye(len(features), dtype=bool)
    return float(_squared_distances(features, features)[different].mean())


@cache  # of 16, 52 MB in all: drawings are the same in all places and shapes
def _references(colour: int, size: int) -> _References:
    sizes = [size, *(k for k in range(len(SIZES)) if k != size)]
    drawings = [draw_all([Scene(thing, colour, k)], _DRAWN)[0] for k in sizes for thing in range(len(THINGS))]
    bare = np.broadcast_to(drawings[0][0, 0], drawings[0].shape)
    pictures = [*drawings, *map(_blob, drawings[: len(THINGS)]), bare]
    [box] = boxes(Scene(0, colour, size), _WORK)
    found = zip(*(_features(_reduced(picture), box) for picture in pictures), strict=True)
    colours, edges = map(np.concatenate, found)
    return _References(colours, edges, _spread(colours[: len(THINGS)]), _spread(edges[: len(THINGS)]))


def _views(lab: np.ndarray, scene: Scene) -> Iterator[tuple[np.ndarray, tuple[int, int, int]]]:
    """The picture, or its halves for two things, each with the box of its thing."""
    found = boxes(scene, _WORK)
    width = lab.shape[1] // len(found)
    for index, (column, row, edge) in enumerate(found):
        yield lab[:, index * width : (index + 1) * width], (column - index * width, row, edge)


def _alone(view: np.ndarray, box: tuple[int, int, int]) -> bool:
    """Whether all but the box, and what is near it, is of one colour."""
    column, row, edge = box
    rest, near = np.ones(view.shape[:2], dtype=bool), _SHIFT + 1
    rest[max(row - near, 0) : row + edge + near, max(column - near, 0) : column + edge + near] = False
    offsets = view[rest] - np.median(view[rest], axis=0)
    return int((np.sqrt((offsets**2).sum(axis=-1)) > _STRAY_LIMIT).sum()) <= _STRAYS


class Judge:
    """Names the things and the background of pictures that are `canvas` pixels on their shorter side.

    The true drawings of a background and size are made at their first use and kept.
    """

    def __init__(self, canvas: int = CANVAS):
        if canvas < _WORK or canvas % _WORK:
            raise ValueError(f"canvas must be a multiple of {_WORK} pixels, got {canvas}")
        self.canvas = canvas
        self._backgrounds = oklab(np.array(list(COLOURS.values())))

    def identify(self, image: np.ndarray, scene: Scene) -> Scene:
        """What a uint8 picture [H, W, 3] shows of what was asked: `scene` with the things that are where it has its
        own, and the colour of the border.

        `NOTHING` stands for a thing that is blurred, cut, elsewhere, of another size or not alone.
        """
        lab, size = self._lab(image, scene), scene.size
        seen = []
        for view, box in _views(lab, scene):
            nearest = (
                int(_references(scene.colour, size).distances(view, box).argmin()) if _alone(view, box) else NOTHING
            )
            seen.append(nearest if nearest < len(THINGS) else NOTHING)
        other = None if scene.other is None else seen[1]
        return scene._replace(thing=seen[0], other=other, colour=self._border(lab))

    def distances(self, image: np.ndarray, scene: Scene) -> np.ndarray:
        """Distance [1 or 2, things] of a uint8 picture to every thing at the place of each that was asked."""
        references, views = _references(scene.colour, scene.size), _views(self._lab(image, scene), scene)
        return np.stack([references.distances(view, box)[: len(THINGS)] for view, box in views])

    def background(self, image: np.ndarray) -> int:
        """The index of the colour of the border of a picture of any shape, or -1 where it is far from all."""
        return self._border(self._lab(image))

    def _lab(self, image: np.ndarray, scene: Scene | None = None) -> np.ndarray:
        """The reduced picture, of a scene's shape and size unless it may be any."""
        image = np.asarray(image)
        if scene and not (0 <= scene.colour < len(COLOURS) and 0 <= scene.size < len(SIZES)):
            raise ValueError(f"no background {scene.colour} or no size {scene.size} in the vocabulary")
        allowed = [
            (height * self.canvas // CANVAS, width * self.canvas // CANVAS, 3) for width, height in SHAPES.values()
        ]
        allowed = allowed if scene is None else [allowed[scene.shape]]
        if image.shape not in allowed or image.dtype != np.uint8:
            expected = " or ".join(map(str, map(list, allowed)))
            raise ValueError(f"expected a uint8 picture {expected}, got {image.dtype} {image.shape}")
        return _reduced(image)

    def _border(self, lab: np.ndarray) -> int:
        border = np.ones(lab.shape[:2], dtype=bool)
        border[_BORDER:-_BORDER, _BORDER:-_BORDER] = False
        offsets = lab[border][:, None] - self._backgrounds  # [pixels, colours, 3]
        distances = np.sqrt((offsets**2).sum(axis=-1)).mean(axis=0)
        nearest = int(distances.argmin())
        return nearest if distances[nearest] <= _BORDER_LIMIT else NOTHING


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
