"""Pixel masks on the coarser grids of the stages."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def latent_mask(mask: Tensor, height: int, width: int) -> Tensor:
    """Returns a pixel mask [B, 1, H, W] (1: generate, 0: keep, between: mix) on a latent grid [B, 1, height, width].

    A cell gets the largest value of the pixels that lie in it, even in part: a mask thinner than a cell is widened to
    it. Cells of Stage C are 42.67 pixels wide, those of Stage B 4. A mask smaller than the grid is interpolated.
    """
    if mask.shape[-2] < height and mask.shape[-1] < width:
        return F.interpolate(mask.float(), (height, width), mode="bilinear")
    return F.adaptive_max_pool2d(mask.float(), (height, width))
