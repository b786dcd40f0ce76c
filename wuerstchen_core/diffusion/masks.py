"""Pixel masks on the coarser grids of the stages."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

MASK_THRESHOLD = 0.5  # pixels of a mask from this value on are generated, others are kept


def latent_mask(mask: Tensor, height: int, width: int) -> Tensor:
    """Returns a pixel mask [B, 1, H, W] (1: generate, 0: keep) on a latent grid [B, 1, height, width], as 0 or 1.

    A cell is 1 if any masked pixel lies in it, even in part, so that nothing masked is kept. Cells of Stage C are
    42.67 pixels wide, those of Stage B 4.
    """
    return F.adaptive_max_pool2d((mask >= MASK_THRESHOLD).float(), (height, width))
