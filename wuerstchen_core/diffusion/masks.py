"""Masks of pixels, brought to the coarse grids that the stages work on."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

PAINTED = 0.5  # a pixel of a mask is painted from here on; a soft mask has values in between


def latent_mask(mask: Tensor, height: int, width: int) -> Tensor:
    """A pixel mask [B, 1, H, W] (1: paint, 0: keep) on a latent grid [B, 1, height, width], hard: 0 or 1.

    A cell is painted if any painted pixel lies in it, wholly or in part, so that nothing masked is kept. Cells of
    Stage C are 42.67 pixels wide, those of Stage B 4.
    """
    return F.adaptive_max_pool2d((mask >= PAINTED).float(), (height, width))
