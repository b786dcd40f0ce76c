"""The pictures that the demo is trained on, and sheets of pictures to look at."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..demo.artwork import CANVAS, draw_all
from ..demo.vocabulary import THINGS, Scene, caption, held_out, scenes
from ..tables import from_table
from .chance import Chance


@dataclass(frozen=True)
class DataConfig:
    """The `[data]` table, for a trial that need not take hours."""

    canvas: int = CANVAS  # pixels, a multiple of 64
    things: int = len(THINGS)  # only the first so many

    def __post_init__(self) -> None:
        if self.canvas < 64 or self.canvas % 64:
            raise ValueError(f"[data] canvas must be a multiple of 64 pixels, got {self.canvas}")
        if not 0 < self.things <= len(THINGS):
            raise ValueError(f"[data] things must be 1 to {len(THINGS)}, got {self.things}")


class DemoPictures:
    """The demo's scenes as pictures [N, 3, canvas, canvas] uint8, without the held-out ones (or only these)."""

    def __init__(self, config: Mapping[str, Any] | None = None, held: bool = False):
        data = from_table(DataConfig, (config or {}).get("data", {}), "data")
        shown = [scene for scene in scenes() if scene.thing < data.things]
        self.scenes: list[Scene] = [scene for scene in shown if held_out(scene) == held]
        self.images = torch.from_numpy(draw_all(self.scenes, data.canvas)).permute(0, 3, 1, 2)

    def __len__(self) -> int:
        return len(self.scenes)

    def pick(self, chance: Chance) -> Tensor:
        """Indices [n] of random pictures, without repetition in a batch where there are enough."""
        return chance.pick(len(self))

    def spread(self, count: int) -> Tensor:
        """Indices of up to `count` pictures from all over, for a sheet."""
        return torch.arange(len(self))[:: max(1, len(self) // count)][:count]

    def captions(self, indices: Tensor, chance: Chance, drop: float = 0.0) -> list[str]:
        """A wording for each picture; a share of `drop` is empty."""
        dropped, words = chance.uniform() < drop, map(random.Random, chance.integers(2**31).tolist())
        wordings = [caption(self.scenes[i], word) for i, word in zip(indices.tolist(), words, strict=True)]
        return ["" if empty else wording for empty, wording in zip(dropped.tolist(), wordings, strict=True)]

    def view(self, indices: Tensor | slice) -> Tensor:
        """Pictures [B, 3, H, W] in [0, 1]."""
        return self.images[indices].float() / 255


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
    array = (image.float().permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    return Image.fromarray(array).resize((width, width * array.shape[0] // array.shape[1]), Image.Resampling.LANCZOS)
