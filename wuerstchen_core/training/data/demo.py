"""The dataset of the demo's scenes."""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate, product
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor

from ...common.dataclass_config import CountOrZero, Fraction, OneOf, Range, from_table, option
from ...common.geometry import Box
from ...demo import vocabulary
from ...demo.artwork import CANVAS, boxes, draw_all, picture_size, random_boxes
from ...demo.vocabulary import COLOURS, LAYOUTS, SHAPES, SIMPLE, THINGS, TRAINED_THINGS, Scene
from ..rng import StepRandom
from .buckets import most_square
from .dataset import Compute, ImageDataset, IndexedDataset, identity

MAX_SIMPLE, MAX_OTHER = 1000, 400  # default of `most`: for a simple layout on squares, and otherwise
MAX_SIDE = 512  # in pixels, of pictures on other canvases
MEMORY = 2**30  # bytes up to which the drawings of a dataset stay in memory
PARTS = 1000  # of all batches, by which the share of scattered scenes is rounded
SCATTERED = ("large", "pair")  # layouts whose captions name neither a size nor a place


@dataclass(frozen=True)
class DemoDataConfig:
    """The `[data]` table of a run on the demo's scenes; smaller values give short trials."""

    canvas: int = option(CANVAS, "side of a square in pixels, a multiple of 64")
    larger: tuple[int, ...] = option(
        (), "further sides of squares, whose scenes are fewer by their area; with other shapes up to 512 pixels long"
    )
    things: Annotated[int, Range(least=1, most=len(THINGS))] = option(TRAINED_THINGS, "use only the first ones")
    layouts: Annotated[tuple[str, ...], OneOf(LAYOUTS)] = option(SIMPLE, "kinds of scenes")
    shapes: Annotated[tuple[str, ...], OneOf(SHAPES)] = option(("square",), "aspect ratios")
    most: CountOrZero = option(
        0, "scenes of each layout and shape, sampled from all; 0: 1000 and, with several things or off squares, 400"
    )
    scattered: CountOrZero = option(
        0,
        "further scenes of each shape, of one or two things of `layouts` in random sizes at random places; on larger "
        "canvases fewer by their area",
    )
    scattered_share: Fraction = option(0.5, "fraction of batches that have scattered scenes, if there are any")
    background: Annotated[str, OneOf(("", *COLOURS))] = option(
        "", "only scenes on this background, with captions that name random ones"
    )

    def __post_init__(self) -> None:
        for name, side in (("canvas", self.canvas), *(("larger", side) for side in self.larger)):
            if side < 64 or side % 64:
                raise ValueError(f"[data] {name} must be a multiple of 64 pixels, got {side}")
        if self.scattered and not set(self.layouts) & set(SCATTERED):
            raise ValueError(f"[data] scattered is for the layouts {' and '.join(SCATTERED)}: add one of them")
        if any(side <= self.canvas or side > MAX_SIDE for side in self.larger):
            raise ValueError(f"[data] larger must be sides above canvas, up to {MAX_SIDE} pixels, got {self.larger}")


class DemoDataset(IndexedDataset):
    """Scenes of one shape and size: those for training, or the held-out ones; scattered ones, or the others.

    Each is drawn when it is first needed, and at every use if all of them would fill more than 1 GiB.
    """

    has_boxes = True

    def __init__(
        self,
        data: Mapping[str, Any] | None = None,
        held_out: bool = False,
        shape: str = "",
        canvas: int = 0,
        scattered: bool = False,
    ):
        """`data` is the `[data]` table; `shape` defaults to the table's first one, and `canvas` to the table's."""
        self._data, self._is_scattered = data or {}, scattered
        self.config = config = from_table(DemoDataConfig, self._data, "data")
        self._shape, self._canvas = shape or config.shapes[0], canvas or config.canvas
        layouts = [layout for layout in config.layouts if not scattered or layout in SCATTERED]
        self.scenes = [scene for layout in layouts for scene in self._layout_scenes(layout, held_out)]
        self._placed: list[list[Box]] | None = None
        if scattered and self.scenes:
            rng = random.Random(f"scattered {self._shape} {held_out}")
            count = max(1, config.scattered * config.canvas**2 // self._canvas**2)
            self.scenes = rng.choices(self.scenes, k=count)
            self._placed = [random_boxes(scene, self._canvas, rng) for scene in self.scenes]
        if not self.scenes and not held_out:
            raise ValueError(
                f"[data] leaves no {self._shape} scene: no layout here has only the first {config.things} things"
                f"{' on this background' if config.background else ''}; choose more things"
            )
        # If there are other layouts than the simple ones, large things count twice.
        twice = {"large"} if set(config.layouts) > set(SIMPLE) else set()
        counts = [1 + (scene.layout in twice) for scene in self.scenes]
        self._weighted = torch.arange(len(self.scenes)).repeat_interleave(torch.tensor(counts, dtype=torch.long))
        width, height = self.size = picture_size(list(SHAPES).index(self._shape), self._canvas)
        self.side, self.square, self.examples = min(self.size), width == height, len(self.scenes)
        draw_all(self.scenes[:1], self._canvas)  # raises an error now if it cannot draw
        # Drawings in random sizes are slow to render: those stay in memory in any case.
        kept = self._placed is not None or 3 * width * height * len(self.scenes) <= MEMORY
        self._drawing = lru_cache(None if kept else 0)(self._draw)

    def __len__(self) -> int:
        return len(self.scenes)

    def images(self, batch: Tensor | slice) -> Tensor:
        indices = torch.arange(len(self.scenes))[batch].tolist()
        width, height = self.size
        drawn = np.array([self._drawing(index) for index in indices], dtype=np.uint8).reshape(-1, height, width, 3)
        return torch.from_numpy(drawn).permute(0, 3, 1, 2).float() / 255

    def _draw(self, index: int) -> np.ndarray:
        """Returns the drawing [H, W, 3] of a scene."""
        placed = None if self._placed is None else [self._placed[index]]
        return draw_all([self.scenes[index]], self._canvas, placed)[0]

    def _layout_scenes(self, layout: str, held_out: bool) -> list[Scene]:
        """Returns the scenes of a layout, or a sample of them if there are too many."""
        config, shape = self.config, list(SHAPES).index(self._shape)
        colours = [i for i, name in enumerate(COLOURS) if config.background in ("", name)]
        found = [
            scene
            for scene in vocabulary.scenes([layout], shape)
            if max(scene.things) < config.things and scene.colour in colours and vocabulary.held_out(scene) == held_out
        ]
        most = config.most or (MAX_SIMPLE if layout in SIMPLE and not shape else MAX_OTHER)
        most = max(1, most * config.canvas**2 // self._canvas**2)
        return found if len(found) <= most else random.Random(f"{layout} {self._shape}").sample(found, most)

    def sample_batch(self, rng: StepRandom) -> Tensor:
        return self._weighted[rng.pick(len(self._weighted))]

    def caption(self, index: int, words: random.Random) -> str:
        scene = self.scenes[index]
        if self.config.background:
            scene = scene._replace(colour=words.randrange(len(COLOURS)))
        return vocabulary.caption(scene, words)

    def boxes(self, batch: Tensor) -> list[list[Box]]:
        return [
            boxes(self.scenes[index], self._canvas) if self._placed is None else self._placed[index]
            for index in batch.tolist()
        ]

    def preview_images(self) -> IndexedDataset | None:
        return None if self.missing_previews() else self._held_out

    def missing_previews(self) -> str:
        return "" if len(self._held_out) else "held-out drawings: add layouts or things under [data]"

    @cached_property
    def _held_out(self) -> DemoDataset:
        return DemoDataset(self._data, held_out=True, scattered=self._is_scattered)


class MultiShapeDemoDataset(ImageDataset):
    """Scenes of several shapes and sizes. Each batch has scattered scenes or others, by the share of the former.

    It has one shape and size, chosen with a probability proportional to its scenes. The handle of a batch is the index
    of its dataset and the indices [B] of its scenes there.
    """

    square = False
    has_boxes = True

    def __init__(self, data: Mapping[str, Any]):
        config = from_table(DemoDataConfig, data, "data")
        self._share = config.scattered_share if config.scattered else 0.0
        sizes = [
            (shape, canvas)
            for canvas, shape in product((config.canvas, *config.larger), config.shapes)
            if canvas == config.canvas or max(SHAPES[shape]) * canvas <= MAX_SIDE * CANVAS
        ]
        self._plain = [DemoDataset(data, False, *size) for size in sizes if self._share < 1]
        self._scattered = [DemoDataset(data, False, *size, scattered=True) for size in sizes if self._share > 0]
        self.datasets = [*self._plain, *self._scattered]
        self.side = min(dataset.side for dataset in self.datasets)
        self.size = most_square(dataset.size for dataset in self.datasets)
        self.examples = sum(dataset.examples for dataset in self.datasets)

    def sample_batch(self, rng: StepRandom) -> tuple[int, Tensor]:
        scattered = self._share > 0 and rng.shared(PARTS) < self._share * PARTS
        datasets = self._scattered if scattered else self._plain
        ends = list(accumulate(map(len, datasets)))
        shape = bisect_right(ends, rng.shared(ends[-1])) + scattered * len(self._plain)
        return shape, self.datasets[shape].sample_batch(rng)

    def is_scattered(self, batch: tuple[int, Tensor]) -> bool:
        """True if a batch has scattered scenes."""
        return batch[0] >= len(self._plain)

    def captions(self, batch: tuple[int, Tensor], rng: StepRandom, drop: float = 0.0) -> list[str]:
        return self.datasets[batch[0]].captions(batch[1], rng, drop)

    def boxes(self, batch: tuple[int, Tensor]) -> list[list[Box]]:
        return self.datasets[batch[0]].boxes(batch[1])

    def images(self, batch: tuple[int, Tensor]) -> Tensor:
        return self.datasets[batch[0]].images(batch[1])

    def map_images(self, name: str, compute: Compute, derive: Compute = identity) -> Callable[[Any], Tensor]:
        maps = [dataset.map_images(name, compute, derive) for dataset in self.datasets]
        return lambda batch: maps[batch[0]](batch[1])

    def preview_images(self) -> IndexedDataset | None:
        return self.datasets[0].preview_images()

    def missing_previews(self) -> str:
        return self.datasets[0].missing_previews()
