"""A ControlNet: features of a hint picture that are added inside a frozen prior (arXiv 2302.05543).

As in Stable Cascade, they depend on the hint alone, so that one call serves all steps of a sampling, and both sides of
guidance.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..common.dataclass_config import Count, CountOrZero, OneOf, option
from ..common.numbers import to_float
from .init import xavier_init
from .layers import ChannelNorm, ResBlock, channels_last
from .operations import Operations

STRIDE = 32  # pixels of the hint for one latent, as those of the image encoder
LEVELS = 4  # of resolution
STEM = 4  # the part of it that the first convolution has
KINDS = ("outline", "silhouette", "colours", "boxes", "given")

# What is added to the input of each of a prior's blocks: features [1 or B, c, h, w], or None.
Control: TypeAlias = Sequence[Tensor | None]


@dataclass(frozen=True)
class ControlNetParams:
    """Sizes of a ControlNet, and the prior that it is for; the defaults are for v2's."""

    prior_width: Count = option(1536, "channels of the prior")
    prior_depth: Count = option(32, "blocks of the prior")
    prior_release: Annotated[str, OneOf(("v1", "v2"))] = option("v2", "release of the prior: v1 or v2")
    prior_blocks: tuple[CountOrZero, ...] = option(tuple(range(0, 32, 4)), "blocks of the prior that it adds to")
    hints: Annotated[str, OneOf(KINDS)] = option("given", f"hints that it reads: {', '.join(KINDS)}")
    widths: tuple[Count, ...] = option((64, 128, 256, 512), "channels at 1/4, 1/8, 1/16 and 1/32 of the hint")
    repeats: tuple[Count, ...] = option((1, 1, 2, 4), "convolutional blocks of each width")
    prior_values: tuple[float, ...] = option((), "some of the prior's weights, to recognise it; empty: unknown")

    def __post_init__(self) -> None:
        counts = len(self.widths), len(self.repeats)
        if counts != (LEVELS, LEVELS):
            raise ValueError(f"a ControlNet has {LEVELS} widths and {LEVELS} repeats, got {counts[0]} and {counts[1]}")
        blocks = list(self.prior_blocks)
        if not blocks or blocks != sorted(set(blocks)) or blocks[-1] >= self.prior_depth:
            raise ValueError(
                f"the prior_blocks of a ControlNet are numbers from 0 to {self.prior_depth - 1} in ascending order, "
                f"got {blocks}"
            )
        for value in self.prior_values:
            to_float("a prior_value of a ControlNet:", value)


class ControlNet(nn.Module):
    """Maps a hint picture to what is added before chosen blocks of a prior: nothing, before training."""

    def __init__(
        self, params: ControlNetParams, *, operations: Any = Operations, device: Any = None, dtype: Any = None
    ):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.params = params
        self.hint_stem = operations.Conv2d(3, params.widths[0], kernel_size=STEM, stride=STEM, **factory)
        self.levels = nn.ModuleList()
        before = params.widths[0]
        for i, (c, repeats) in enumerate(zip(params.widths, params.repeats, strict=True)):
            level = nn.Sequential()
            if i:
                level.extend([ChannelNorm(), operations.Conv2d(before, c, kernel_size=2, stride=2, **factory)])
            level.extend([ResBlock(c, operations=operations, **factory) for _ in range(repeats)])
            self.levels.append(level)
            before = c
        self.norm = ChannelNorm()
        # Named by the prior's blocks, so that the keys show which they are.
        self.projections = nn.ModuleDict(
            {str(i): operations.Conv2d(before, params.prior_width, 1, **factory) for i in params.prior_blocks}
        )

    def init_weights(self) -> None:
        """Initialises the weights before training: projections are zero."""
        self.apply(xavier_init)
        for projection in self.projections.values():
            nn.init.zeros_(projection.get_parameter("weight"))

    def forward(self, hint: Tensor, size: tuple[int, int]) -> tuple[Tensor | None, ...]:
        """Returns the `Control` of hints [B, 3, H, W] in [0, 1] for latents of a size (h, w), one entry per block.

        The hints are in the dtype to compute in; `fit_hint` gives them the shape of the latents.
        """
        x = self.hint_stem(channels_last((scale_hint(hint, size) * 2 - 1).to(hint.dtype)))
        for level in self.levels:
            x = level(x)
        x = self.norm(x)
        found = {int(name): projection(x) for name, projection in self.projections.items()}
        return tuple(found.get(i) for i in range(self.params.prior_depth))


def fit_hint(hint: Tensor, size: tuple[int, int]) -> Tensor:
    """Returns hints [B, c, H, W] cropped to the shape of latents (h, w), with 32 pixels per latent, in fp32."""
    return scale_hint(crop_hint(hint, size), size)


def scale_hint(hint: Tensor, size: tuple[int, int]) -> Tensor:
    """Returns hints [B, c, H, W] scaled to 32 pixels per latent of a size (h, w), in fp32."""
    pixels = [STRIDE * side for side in size]
    hint = hint.float()
    if list(hint.shape[-2:]) == pixels:
        return hint
    return F.interpolate(hint, size=pixels, mode="bilinear", antialias=True, align_corners=False)


def crop_hint(hint: Tensor, size: tuple[int, int]) -> Tensor:
    """Returns hints [B, c, H, W] for latents of a size (h, w), cropped around the centre if their shape is another one.

    Latents are rounded up, so that hints of all pictures that have such latents are kept whole.
    """
    (height, width), (h, w) = hint.shape[-2:], size
    if max((h - 1) / height, (w - 1) / width) < min(h / height, w / width):
        return hint
    new_height, new_width = min(height, round(width * h / w)), min(width, round(height * w / h))
    top, left = (height - new_height) // 2, (width - new_width) // 2
    return hint[..., top : top + max(new_height, 1), left : left + max(new_width, 1)]


def sum_controls(controls: Iterable[tuple[Control, float | Tensor]]) -> list[Tensor | None]:
    """Returns the sum of controls, each times its strength: a number, or a mask [1 or B, 1, h, w]."""
    total: list[Tensor | None] = []
    for control, strength in controls:
        total += [None] * (len(control) - len(total))
        for i, x in enumerate(control):
            if x is not None:
                before, x = total[i], x * (strength.to(x) if isinstance(strength, Tensor) else strength)
                total[i] = x if before is None else before + x
    return total


def repeat_control(control: Control, batch: int) -> list[Tensor | None]:
    """Returns a control for a batch that repeats its own one, as guidance does; one of batch 1 stays as it is."""
    return [x if x is None or len(x) in (1, batch) else torch.cat([x] * (batch // len(x))) for x in control]
