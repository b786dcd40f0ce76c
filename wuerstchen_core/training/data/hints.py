"""Hints for ControlNets, made of images: outlines, silhouettes, blocks of colour, and boxes of things."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ...common.geometry import Box

EDGE = 0.1  # least change of a channel over an edge, of its range
THING = 0.1  # least difference to the background
BLOCKS = 8  # of colour, on the shorter side
LINES = 256  # a line of width 1 is this fraction of the shorter side, or a pixel if that is more
BOX_COLOURS = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (1.0, 1.0, 0.0))
_SOBEL = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]) / 4


def outlines(images: Tensor) -> Tensor:
    """Returns the edges in images [B, 3, H, W] in [0, 1], white on black, as [B, 1, H, W]."""
    channels = F.pad(images, (1, 1, 1, 1), mode="replicate").flatten(0, 1)[:, None]
    gradients = F.conv2d(channels, torch.stack([_SOBEL, _SOBEL.T])[:, None].to(images))
    steepest = gradients.square().sum(dim=1).sqrt().unflatten(0, images.shape[:2]).amax(dim=1, keepdim=True)
    return (steepest > EDGE).to(images)


def silhouettes(images: Tensor) -> Tensor:
    """Returns what differs from the background in images [B, 3, H, W], with its holes, white on black, as [B, 1, H, W].

    The background is the median colour of the border.
    """
    border = torch.cat([images[..., 0, :], images[..., -1, :], images[..., :, 0], images[..., :, -1]], dim=-1)
    background = border.median(dim=-1).values[..., None, None]
    things = ((images - background).abs().amax(dim=1, keepdim=True) > THING).to(images)
    return filled(things)


def contours(images: Tensor) -> Tensor:
    """Returns the outlines [B, 1, H, W] of `silhouettes`, without edges within them."""
    things = silhouettes(images)
    return things - -F.max_pool2d(-things, 3, stride=1, padding=1)


def widened(lines: Tensor, width: float) -> Tensor:
    """Returns white lines [B, 1, H, W] widened by `width` - 1, in units of `LINES`."""
    pixels = round(max(0.0, width - 1) * max(1.0, min(lines.shape[-2:]) / LINES))
    if not pixels:
        return lines
    before = pixels // 2
    padded = F.pad(lines, (before, pixels - before, before, pixels - before))
    return F.max_pool2d(padded, pixels + 1, stride=1)


def filled(shapes: Tensor) -> Tensor:
    """Returns white shapes [B, 1, H, W] with everything that they enclose."""
    free = shapes <= 0.5
    outside = torch.ones_like(free)
    outside[..., 1:-1, 1:-1] = False
    directions, reached = (_runs(free)[free], _runs(free.mT).mT[free]), outside[free]
    while True:  # of a pixel that is reached, its runs along both directions are, too
        found = reached
        for runs in directions:
            hit = torch.zeros(free.numel() + 1, dtype=torch.bool, device=free.device)
            hit[runs[found]] = True
            found = hit[runs]
        if torch.equal(found, reached):
            return torch.ones_like(free).masked_scatter(free, ~reached).to(shapes)
        reached = found


def _runs(free: Tensor) -> Tensor:
    """Returns for each pixel that is True the number of its run along the last dimension, which others end."""
    starts = free & ~F.pad(free[..., :-1], (1, 0))
    return starts.flatten().cumsum(0).view(free.shape)


def colour_blocks(images: Tensor) -> Tensor:
    """Returns images [B, 3, H, W] as blocks of their mean colour."""
    height, width = images.shape[-2:]
    block = min(height, width) / BLOCKS
    coarse = F.interpolate(images, (max(1, round(height / block)), max(1, round(width / block))), mode="area")
    return F.interpolate(coarse, (height, width), mode="nearest")


def draw_boxes(boxes: Sequence[Sequence[Box]], size: tuple[int, int]) -> Tensor:
    """Returns the boxes of things of each image as rectangles [B, 3, *size] in `BOX_COLOURS`, in their order."""
    out = torch.zeros(len(boxes), 3, *size)
    for image, own in zip(out, boxes, strict=True):
        for (left, top, width, height), colour in zip(own, BOX_COLOURS, strict=False):
            image[:, top : top + height, left : left + width] = torch.tensor(colour)[:, None, None]
    return out
