"""Recognises the things in generated images without a trained network.

At the position of each requested thing, an image is compared with the original drawing of every thing on the requested
background, by colour (OKLab, Ottosson 2020) and by edges (histograms of oriented gradients, Dalal and Triggs 2005). A
thing is recognised only if its drawing is nearer than all others, than drawings of another size, strongly blurred
drawings and the empty background, and if the rest of the image has one colour: it is complete and alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product

import numpy as np
from PIL import Image, ImageFilter

from wuerstchen_core.common.geometry import Box
from wuerstchen_core.demo.artwork import CANVAS, boxes, draw_all
from wuerstchen_core.demo.vocabulary import COLOURS, SHAPES, SIZES, THINGS, Scene

NOTHING = -1  # stands for no thing, or no known background

_WORK = 64  # pixels of the shorter side at which images are compared
_DRAWN = 128  # pixels per side of the original drawings, then averaged down to _WORK
_SHIFT = 2  # work pixels that a thing may be shifted, each way (8 of 256)
_CELL = 8  # work pixels per side of a gradient histogram
_BLOCK = 2  # work pixels per side of a colour block
_BINS = 9  # orientations over 180 degrees
_EDGE_FLOOR = 0.02  # mean gradient of a cell below which edges count less: blur, noise
_BLOB_SIGMA = 4.0  # work pixels (16 of 256): the blur that turns a drawing into a blob
_BORDER = 2  # work pixels: a border this wide is clear of every drawing
_BORDER_LIMIT = 0.07  # OKLab; the backgrounds are at least twice as far from each other
_STRAY_LIMIT = 0.07  # OKLab; pixels farther from the median colour are not background
_STRAYS = 16  # work pixels that may be no background: a patch of 16 x 16 of 256

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
    """Converts sRGB 0..255 [..., 3] to OKLab float32 [..., 3]: lightness 0..1, two colour axes."""
    value = np.asarray(rgb, dtype=np.float32) / 255.0
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    return np.cbrt(linear @ _TO_LMS.T) @ _TO_LAB.T


def _reduced(image: np.ndarray) -> np.ndarray:
    """Averages a uint8 image [H, W, 3] down to `_WORK` pixels on its shorter side, as OKLab float32."""
    step = min(image.shape[:2]) // _WORK
    height, width = (side // step for side in image.shape[:2])
    rows = image.reshape(height, step, -1).sum(axis=1, dtype=np.float32)
    return oklab(rows.reshape(height, width, step, 3).sum(axis=2) / step**2)


def _oriented_gradients(lab: np.ndarray) -> np.ndarray:
    """Returns gradient strength by orientation, [H, W, 3] to [H, W, _BINS]; the strongest channel counts."""
    down, right = np.gradient(lab, axis=(0, 1))
    strength = np.hypot(down, right)
    axis = strength.argmax(axis=-1)[..., None]
    down, right, strength = (np.take_along_axis(part, axis, axis=-1)[..., 0] for part in (down, right, strength))
    position = (np.arctan2(down, right) % np.pi) / np.pi * _BINS  # split between the two nearest bins
    distance = np.abs(position[..., None] - np.arange(_BINS))
    distance = np.minimum(distance, _BINS - distance)
    return strength[..., None] * np.maximum(1.0 - distance, 0.0).astype(np.float32)


def _means(field: np.ndarray, edge: int) -> np.ndarray:
    """Returns the means of all squares of `edge` pixels, [H, W, D] to [H - edge + 1, W - edge + 1, D]."""
    for _ in range(2):  # downwards, and again with rows and columns swapped
        sums = np.pad(field.cumsum(axis=0), ((1, 0), (0, 0), (0, 0)))
        field = ((sums[edge:] - sums[:-edge]) / edge).swapaxes(0, 1)
    return field


def _features(view: np.ndarray, box: Box, reach: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Returns colours [shifts, C] and edges [shifts, E] around a box of a view [H, W, 3], for shifts up to `reach`.

    The window is the box widened to whole cells; beyond the view, border pixels are repeated.
    """
    column, row, edge, _ = box
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
    """Returns the mean squared differences [N, M] of rows [N, F] and [M, F]."""
    squares = (rows**2).sum(axis=1)[:, None] + (columns**2).sum(axis=1)
    return np.maximum(squares - 2.0 * rows @ columns.T, 0.0) / rows.shape[1]


@dataclass(frozen=True)
class _References:
    """Features of every thing, followed by those of everything that is not a thing as requested."""

    colours: np.ndarray
    edges: np.ndarray
    colour_scale: float
    edge_scale: float

    def distances(self, view: np.ndarray, box: Box) -> np.ndarray:
        """Returns the distance to every reference at its best shift; 1 is typical of two different things."""
        colours, edges = _features(view, box, _SHIFT)
        by_colour = _squared_distances(colours, self.colours) / self.colour_scale
        by_edge = _squared_distances(edges, self.edges) / self.edge_scale
        return ((by_colour + by_edge) / 2).min(axis=0)


def _blob(drawing: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(drawing).filter(ImageFilter.GaussianBlur(_BLOB_SIGMA * _DRAWN / _WORK)))


def _spread(features: np.ndarray) -> float:
    """Returns the mean squared distance of two different rows."""
    different = ~np.eye(len(features), dtype=bool)
    return float(_squared_distances(features, features)[different].mean())


@cache  # 16 entries, 52 MB: drawings do not depend on position and shape
def _references(colour: int, size: int) -> _References:
    sizes = [size, *(k for k in range(len(SIZES)) if k != size)]
    drawings = [draw_all([Scene(thing, colour, k)], _DRAWN)[0] for k in sizes for thing in range(len(THINGS))]
    bare = np.broadcast_to(drawings[0][0, 0], drawings[0].shape)
    images = [*drawings, *map(_blob, drawings[: len(THINGS)]), bare]
    [box] = boxes(Scene(0, colour, size), _WORK)
    features = zip(*(_features(_reduced(image), box) for image in images), strict=True)
    colours, edges = map(np.concatenate, features)
    return _References(colours, edges, _spread(colours[: len(THINGS)]), _spread(edges[: len(THINGS)]))


def _views(lab: np.ndarray, scene: Scene) -> Iterator[tuple[np.ndarray, Box]]:
    """Yields the part of the image around each thing with the thing's box.

    It is the whole image, or a half for each of two things; the first of three things has the upper half.
    """
    found = boxes(scene, _WORK)
    height, width = lab.shape[:2]
    half = height // 2 if len(found) == 3 else 0
    if half:
        yield lab[:half], found.pop(0)
    side = width // len(found)
    for index, (column, row, edge, _) in enumerate(found):
        yield lab[half:, index * side : (index + 1) * side], (column - index * side, row - half, edge, edge)


def _alone(view: np.ndarray, box: Box) -> bool:
    """True if everything outside the box and its margin has one colour."""
    column, row, edge, _ = box
    rest, near = np.ones(view.shape[:2], dtype=bool), _SHIFT + 1
    rest[max(row - near, 0) : row + edge + near, max(column - near, 0) : column + edge + near] = False
    if not rest.any():
        return True
    offsets = view[rest] - np.median(view[rest], axis=0)
    return int((np.sqrt((offsets**2).sum(axis=-1)) > _STRAY_LIMIT).sum()) <= _STRAYS


class Judge:
    """Recognises the things and the background of images with `canvas` pixels on their shorter side.

    The original drawings of each background and size are drawn at their first use and cached.
    """

    def __init__(self, canvas: int = CANVAS):
        if canvas < _WORK or canvas % _WORK:
            raise ValueError(f"canvas must be a multiple of {_WORK} pixels, got {canvas}")
        self.canvas = canvas
        self._backgrounds = oklab(np.array(list(COLOURS.values())))

    def identify(self, image: np.ndarray, scene: Scene) -> Scene:
        """Returns `scene` with the things that a uint8 image [H, W, 3] shows at its positions, and the border's colour.

        A thing that is blurred, cut, elsewhere, of another size or not alone is `NOTHING`.
        """
        lab, size = self._lab(image, scene), scene.size
        seen = []
        for view, box in _views(lab, scene):
            nearest = (
                int(_references(scene.colour, size).distances(view, box).argmin()) if _alone(view, box) else NOTHING
            )
            seen.append(nearest if nearest < len(THINGS) else NOTHING)
        names = ("thing", "other", "third")
        return scene._replace(**dict(zip(names, seen, strict=False)), colour=self._border(lab))

    def distances(self, image: np.ndarray, scene: Scene) -> np.ndarray:
        """Returns the distances [1 to 3, things] of a uint8 image to every thing at each requested position."""
        references, views = _references(scene.colour, scene.size), _views(self._lab(image, scene), scene)
        return np.stack([references.distances(view, box)[: len(THINGS)] for view, box in views])

    def background(self, image: np.ndarray) -> int:
        """Returns the index of the border's colour, or -1 if it is far from all; the image may have any shape."""
        return self._border(self._lab(image))

    def _lab(self, image: np.ndarray, scene: Scene | None = None) -> np.ndarray:
        """Returns the reduced image. Raises ValueError if it has not the scene's shape (or, without a scene, any)."""
        image = np.asarray(image)
        if scene and not (0 <= scene.colour < len(COLOURS) and 0 <= scene.size < len(SIZES)):
            raise ValueError(f"no background {scene.colour} or no size {scene.size} in the vocabulary")
        allowed = [
            (height * self.canvas // CANVAS, width * self.canvas // CANVAS, 3) for width, height in SHAPES.values()
        ]
        allowed = allowed if scene is None else [allowed[scene.shape]]
        if image.shape not in allowed or image.dtype != np.uint8:
            expected = " or ".join(map(str, map(list, allowed)))
            raise ValueError(f"expected a uint8 image {expected}, got {image.dtype} {image.shape}")
        return _reduced(image)

    def _border(self, lab: np.ndarray) -> int:
        border = np.ones(lab.shape[:2], dtype=bool)
        border[_BORDER:-_BORDER, _BORDER:-_BORDER] = False
        offsets = lab[border][:, None] - self._backgrounds  # [pixels, colours, 3]
        distances = np.sqrt((offsets**2).sum(axis=-1)).mean(axis=0)
        nearest = int(distances.argmin())
        return nearest if distances[nearest] <= _BORDER_LIMIT else NOTHING


@cache
def contrast(thing: int, colour: int) -> float:
    """Returns the OKLab distance from a background of COLOURS that a third of a thing's drawing does not exceed."""
    scenes = [Scene(thing, index, 0) for index in (colour, (colour + 1) % len(COLOURS))]
    drawing, another = draw_all(scenes, _DRAWN)
    opaque = (drawing == another).all(axis=-1)
    distances = oklab(drawing[opaque]) - oklab(drawing[0, 0])
    return float(np.quantile(np.sqrt((distances**2).sum(axis=-1)), 1 / 3))


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Returns the peak signal-to-noise ratio in dB of two uint8 images; infinite if they are equal."""
    a, b = np.asarray(a), np.asarray(b)
    if a.shape != b.shape or a.dtype != np.uint8 or b.dtype != np.uint8:
        raise ValueError(f"expected uint8 images of one shape, got {a.dtype} {a.shape}, {b.dtype} {b.shape}")
    error = float(np.mean((a.astype(np.float64) - b) ** 2))
    return 10.0 * math.log10(255.0**2 / error) if error else math.inf


def wilson_interval(successes: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Returns the Wilson score interval of a proportion; z = 1.96 for 95 %."""
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"expected 0 <= successes <= n with n >= 1, got {successes} of {n}")
    rate, spread = successes / n, z * z / n
    centre = (rate + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(rate * (1 - rate) / n + spread / (4 * n))
    return max(0.0, centre - half), min(1.0, centre + half)
