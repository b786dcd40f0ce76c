"""The demo's pictures as a source to train on."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ...common.dataclass_config import from_table
from ...demo.artwork import CANVAS, draw_all
from ...demo.vocabulary import (
    COLOURS,
    LAYOUTS,
    SHAPES,
    SIMPLE,
    THINGS,
    TRAINED_THINGS,
    Scene,
    caption,
    held_out,
    scenes,
)
from ..rng import StepRandom
from .dataset import Compute, ImageDataset, InMemoryDataset, as_it_is

MOST, FEWER = 1000, 400  # scenes of one layout, if nobody says how many: simple ones on squares, and others


@dataclass(frozen=True)
class DemoDataConfig:
    """The `[data]` table of the demo's pictures, for a trial that need not take hours."""

    canvas: int = CANVAS  # pixels, a multiple of 64
    things: int = TRAINED_THINGS  # only the first so many
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


class DemoDataset(InMemoryDataset):
    """The demo's scenes of one shape, without the held-out ones (or only these)."""

    def __init__(self, data: Mapping[str, Any] | None = None, held_out: bool = False, shape: str = ""):
        """`shape`: the first that `data` names, unless told."""
        self._data = data or {}
        self.config = config = from_table(DemoDataConfig, self._data, "data")
        self._shape = shape or config.shapes[0]
        self.scenes = [scene for layout in config.layouts for scene in self._some(layout, held_out)]
        if not self.scenes and not held_out:
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

    def sample_batch(self, rng: StepRandom) -> Tensor:
        return self._order[rng.pick(len(self._order))]

    def wording(self, index: int, words: random.Random) -> str:
        scene = self.scenes[index]
        if self.config.background:
            scene = scene._replace(colour=words.randrange(len(COLOURS)))
        return caption(scene, words)

    def preview_images(self) -> InMemoryDataset | None:
        return self._held if len(self._held) else None

    @cached_property
    def _held(self) -> DemoDataset:
        """Drawn once, not for each sheet."""
        return DemoDataset(self._data, held_out=True)


class MultiShapeDemoDataset(ImageDataset):
    """The demo's scenes of several shapes; a batch is of one, which is drawn in proportion to its scenes."""

    square = False

    def __init__(self, data: Mapping[str, Any]):
        self.shown = [DemoDataset(data, shape=shape) for shape in from_table(DemoDataConfig, data, "data").shapes]
        self.side = min(one.side for one in self.shown)

    def sample_batch(self, rng: StepRandom) -> tuple[int, Tensor]:
        """Which of `shown`, and the indices [n] there."""
        place, shape = rng.shared(sum(map(len, self.shown))), 0
        while place >= len(self.shown[shape]):
            place, shape = place - len(self.shown[shape]), shape + 1
        return shape, self.shown[shape].sample_batch(rng)

    def captions(self, picked: tuple[int, Tensor], rng: StepRandom, drop: float = 0.0) -> list[str]:
        shape, indices = picked
        return self.shown[shape].captions(indices, rng, drop)

    def images(self, picked: tuple[int, Tensor]) -> Tensor:
        shape, indices = picked
        return self.shown[shape].images(indices)

    def map_images(
        self, name: str, compute: Compute, derive: Compute = as_it_is
    ) -> Callable[[tuple[int, Tensor]], Tensor]:
        known = [one.map_images(name, compute, derive) for one in self.shown]
        return lambda picked: known[picked[0]](picked[1])

    def preview_images(self) -> InMemoryDataset | None:
        """Of the first shape."""
        return self.shown[0].preview_images()
