"""Pictures as the stages take them, those of the demo, and sheets of pictures to look at."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..demo.artwork import CANVAS, draw_all
from ..demo.vocabulary import COLOURS, LAYOUTS, SHAPES, SIMPLE, TAUGHT, THINGS, Scene, caption, held_out, scenes
from ..tables import from_table
from .chance import Chance

AT_ONCE = 32  # pictures that a network sees
MOST, FEWER = 1000, 400  # scenes of one layout, if nobody says how many: simple ones on squares, and others

Compute: TypeAlias = Callable[[Tensor], Tensor]


def as_it_is(x: Tensor) -> Tensor:
    return x


class Pictures(ABC):
    """What stages train on. What `pick` gives stands for the pictures of a batch wherever they are asked for."""

    side: int  # the shortest there is, in pixels
    square: bool  # whether all are squares of it
    position = 0  # where to go on reading after the last batch
    fingerprint = ""  # of what is read and how, if that can change

    def begin(
        self, position: int, fingerprint: str, *, batch: int, seed: int, cache: Path, rank: int, world: int
    ) -> None:
        """Be ready to read on from a `position` of pictures that had a `fingerprint`: `batch` pictures a time for
        process `rank` of `world`. What is in memory is."""
        self.position = position

    @abstractmethod
    def pick(self, chance: Chance) -> Any:
        """The pictures of a batch."""

    @abstractmethod
    def captions(self, picked: Any, chance: Chance, drop: float = 0.0) -> list[str]:
        """A wording for each; a share of `drop` is empty."""

    @abstractmethod
    def view(self, picked: Any) -> Tensor:
        """The pictures [B, 3, H, W] in [0, 1]."""

    def lacks(self, name: str) -> bool:
        """Whether what `each` (or, for "text", `states`) calls by this name has to be computed."""
        return True

    @abstractmethod
    def each(self, name: str, compute: Compute, derive: Compute = as_it_is) -> Callable[[Any], Tensor]:
        """What `derive` makes of the `name` of the pictures of a batch: of what `compute` makes of these pictures
        [B, 3, H, W] in [0, 1], or made of them before."""

    def states(self, compute: Callable[[list[str]], Tensor]) -> Callable[[Any, Chance, float], Tensor]:
        """What `compute` makes of the `captions` of a batch."""
        return lambda picked, chance, drop: compute(self.captions(picked, chance, drop))

    @abstractmethod
    def held(self) -> Shown | None:
        """Pictures for a sheet, best such that are not trained on."""


class Shown(Pictures):
    """Pictures [N, 3, H, W] uint8 in memory, all of one size; a batch is their indices."""

    def __init__(self, images: Tensor, texts: Sequence[str] = ()):
        self.images, self.texts = images, texts
        self.side, self.square = min(images.shape[-2:]), images.shape[-1] == images.shape[-2]

    def __len__(self) -> int:
        return len(self.images)

    def pick(self, chance: Chance) -> Tensor:
        """Indices [n] of random pictures, without repetition in a batch where there are enough."""
        return chance.pick(len(self))

    def spread(self, count: int) -> Tensor:
        """Indices of up to `count` pictures from all over, for a sheet."""
        return torch.arange(len(self))[:: max(1, len(self) // count)][:count]

    def captions(self, picked: Tensor, chance: Chance, drop: float = 0.0) -> list[str]:
        dropped, words = chance.uniform() < drop, map(random.Random, chance.integers(2**31).tolist())
        texts = [self.wording(i, word) for i, word in zip(picked.tolist(), words, strict=True)]
        return ["" if empty else text for empty, text in zip(dropped.tolist(), texts, strict=True)]

    def wording(self, index: int, words: random.Random) -> str:
        """What a picture shows, in words of which `words` may choose."""
        return self.texts[index]

    def view(self, picked: Tensor | slice) -> Tensor:
        return self.images[picked].float() / 255

    def each(self, name: str, compute: Compute, derive: Compute = as_it_is) -> Callable[[Tensor | slice], Tensor]:
        """It is computed here and now, of all pictures."""
        starts = range(0, len(self), AT_ONCE)
        known = torch.cat([derive(compute(self.view(slice(start, start + AT_ONCE)))) for start in starts])
        return lambda picked: known[picked]

    def held(self) -> Shown | None:
        return self


@dataclass(frozen=True)
class DataConfig:
    """The `[data]` table of the demo's pictures, for a trial that need not take hours."""

    canvas: int = CANVAS  # pixels, a multiple of 64
    things: int = TAUGHT  # only the first so many
    layouts: tuple[str, ...] = SIMPLE
    shapes: tuple[str, ...] = ("square",)
    most: int = 0  # scenes of each layout and shape, a sample of all that there are; 0: MOST and FEWER
    background: str = ""  # only pictures on this one, of which captions say that it is any: for a LoRA to learn

    def __post_init__(self) -> None:
        if self.canvas < 64 or self.canvas % 64:
            raise ValueError(f"[data] canvas must be a multiple of 64 pixels, got {self.canvas}")
        if not 0 < self.things <= len(THINGS):
            raise ValueError(f"[data] things must be 1 to {len(THINGS)}, got {self.things}")
        if self.most < 0:
            raise ValueError(f"[data] most must be a number of scenes, or 0, got {self.most}")
        for name, given, known in (("layouts", self.layouts, LAYOUTS), ("shapes", self.shapes, tuple(SHAPES))):
            if not given or not set(given) <= set(known) or len(set(given)) < len(given):
                raise ValueError(f"[data] {name} must be some of {', '.join(known)}, got {', '.join(given) or 'none'}")
        if self.background and self.background not in COLOURS:
            raise ValueError(f"[data] background {self.background!r} is unknown: choose {', '.join(COLOURS)}")


class DemoPictures(Shown):
    """The demo's scenes of one shape, without the held-out ones (or only these)."""

    def __init__(self, data: Mapping[str, Any] | None = None, held: bool = False, shape: str = ""):
        """`shape`: the first that `data` names, unless told."""
        self._data = data or {}
        self.config = config = from_table(DataConfig, self._data, "data")
        self._shape = shape or config.shapes[0]
        self.scenes = [scene for layout in config.layouts for scene in self._some(layout, held)]
        if not self.scenes and not held:
            raise ValueError(
                f"[data] leaves no {self._shape} scene to draw: of these layouts none has only the first "
                f"{config.things} things{' on this background' if config.background else ''}; choose more of them"
            )
        # Large things count twice where there are other layouts than the simple ones.
        twice = {"large"} if set(config.layouts) > set(SIMPLE) else set()
        counts = [1 + (scene.layout in twice) for scene in self.scenes]
        self._order = torch.arange(len(self.scenes)).repeat_interleave(torch.tensor(counts, dtype=torch.long))
        super().__init__(torch.from_numpy(draw_all(self.scenes, config.canvas)).permute(0, 3, 1, 2))

    def _some(self, layout: str, held: bool) -> list[Scene]:
        """The scenes of a layout in their order, or a sample: few enough to keep what networks make of them."""
        shape, known = list(SHAPES).index(self._shape), range(self.config.things)
        colours = [i for i, name in enumerate(COLOURS) if self.config.background in ("", name)]
        shown = [
            scene
            for scene in scenes([layout], shape)
            if held_out(scene) == held and scene.colour in colours and all(thing in known for thing in scene.things)
        ]
        most = self.config.most or (MOST if layout in SIMPLE and not shape else FEWER)
        return shown if len(shown) <= most else random.Random(f"{layout} {self._shape}").sample(shown, most)

    def pick(self, chance: Chance) -> Tensor:
        return self._order[chance.pick(len(self._order))]

    def wording(self, index: int, words: random.Random) -> str:
        scene = self.scenes[index]
        if self.config.background:
            scene = scene._replace(colour=words.randrange(len(COLOURS)))
        return caption(scene, words)

    def held(self) -> Shown | None:
        return self._held if len(self._held) else None

    @cached_property
    def _held(self) -> DemoPictures:
        """Drawn once, not for each sheet."""
        return DemoPictures(self._data, held=True)


class DemoShapes(Pictures):
    """The demo's scenes of several shapes; a batch is of one, which is drawn in proportion to its scenes."""

    square = False

    def __init__(self, data: Mapping[str, Any]):
        self.shown = [DemoPictures(data, shape=shape) for shape in from_table(DataConfig, data, "data").shapes]
        self.side = min(one.side for one in self.shown)

    def pick(self, chance: Chance) -> tuple[int, Tensor]:
        """Which of `shown`, and the indices [n] there."""
        place, shape = chance.shared(sum(map(len, self.shown))), 0
        while place >= len(self.shown[shape]):
            place, shape = place - len(self.shown[shape]), shape + 1
        return shape, self.shown[shape].pick(chance)

    def captions(self, picked: tuple[int, Tensor], chance: Chance, drop: float = 0.0) -> list[str]:
        shape, indices = picked
        return self.shown[shape].captions(indices, chance, drop)

    def view(self, picked: tuple[int, Tensor]) -> Tensor:
        shape, indices = picked
        return self.shown[shape].view(indices)

    def each(self, name: str, compute: Compute, derive: Compute = as_it_is) -> Callable[[tuple[int, Tensor]], Tensor]:
        known = [one.each(name, compute, derive) for one in self.shown]
        return lambda picked: known[picked[0]](picked[1])

    def held(self) -> Shown | None:
        """Of the first shape."""
        return self.shown[0].held()


def sheet(rows: list[Tensor], columns: int = 12, width: int = 128) -> Image.Image:
    """Pictures [B, 3, H, W] in [0, 1], one row of the sheet (or more, if they are many) each."""
    lines = []
    for images in filter(len, rows):
        for part in images.clamp(0, 1).split(columns):
            tiles = [np.asarray(_tile(image, width)) for image in part]
            tiles += [np.zeros_like(tiles[0])] * (columns - len(tiles))
            lines.append(np.concatenate(tiles, axis=1))
    return Image.fromarray(np.concatenate(lines, axis=0))


def _tile(image: Tensor, width: int) -> Image.Image:
    array = (image.float().cpu().permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    return Image.fromarray(array).resize((width, width * array.shape[0] // array.shape[1]), Image.Resampling.LANCZOS)
