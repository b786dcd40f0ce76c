"""Random changes of a picture's colours."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from ...common.dataclass_config import Fraction, Range, option
from .draws import Key, Purpose, generator

LUMA = (0.299, 0.587, 0.114)  # of red, green and blue (ITU-R BT.601)


@dataclass(frozen=True, kw_only=True)
class ColourConfig:
    """The largest changes of colours; each picture's are drawn evenly from minus to plus these numbers."""

    brightness: Fraction = option(0.0, "largest change of the brightness at every use, as a fraction")
    contrast: Fraction = option(0.0, "largest change of the contrast at every use, as a fraction")
    saturation: Fraction = option(0.0, "largest change of the saturation at every use, as a fraction")
    hue: Annotated[float, Range(least=0, most=0.5)] = option(
        0.0, "largest turn of the hues at every use, as a fraction of the circle"
    )

    @property
    def changes_colours(self) -> bool:
        """True if any colours are changed."""
        return max(self.brightness, self.contrast, self.saturation, self.hue) > 0

    def recoloured(self, image: Tensor, key: Key) -> Tensor:
        """Returns an image [3, H, W] uint8 with the colours of a use of its example, unchanged without a key."""
        if not (key and self.changes_colours):
            return image
        largest = torch.tensor([self.brightness, self.contrast, self.saturation, self.hue])
        draws = torch.from_numpy(generator(key, Purpose.COLOURS).uniform(-1, 1, 4)).float() * largest
        brightness, contrast, saturation = (1 + draws[:3]).tolist()
        x = image.float() * brightness
        mean = _grey(x).mean()
        x = mean + contrast * (x - mean)
        grey = _grey(x)
        x = grey + saturation * (x - grey)
        x = torch.einsum("ij,jhw->ihw", _turn(2 * math.pi * float(draws[3])), x)
        return x.round_().clamp_(0, 255).to(torch.uint8)


def _grey(x: Tensor) -> Tensor:
    """Returns the luma [1, H, W] of x [3, H, W]."""
    return torch.einsum("c,chw->hw", torch.tensor(LUMA), x)[None]


def _turn(angle: float) -> Tensor:
    """Returns the matrix [3, 3] of a rotation of colours about the axis of greys."""
    cos, sin = math.cos(angle), math.sin(angle) / math.sqrt(3)
    same = cos + (1 - cos) / 3
    less, more = (1 - cos) / 3 - sin, (1 - cos) / 3 + sin
    return torch.tensor([[same, less, more], [more, same, less], [less, more, same]])
