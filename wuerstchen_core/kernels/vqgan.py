"""Stage A's decoder in bands of rows, and its blocks with gammas folded into the weights, for every device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .dispatch import kernels_enabled
from .linear import linear


class Rows(NamedTuple):
    """Rows [B, c, n, w] of an image, plus one neighbouring row above and below, except at the image's edges."""

    x: Tensor
    top: bool  # True if x starts at the image's first row
    bottom: bool  # True if x ends at the image's last row

    def inner(self, x: Tensor, scale: int = 1) -> Tensor:
        """Crops `x`, computed from these rows at `scale` times their resolution, by the neighbouring rows."""
        return x[:, :, 0 if self.top else scale : None if self.bottom else -scale]


class FoldedBlock:
    """A VQResBlock whose gammas, which scale and shift around its linear layers, are folded into the weights."""

    def __init__(self, block: Any):
        conv, expand, project = block.depthwise[1], block.channelwise[0], block.channelwise[2]
        self.norm, dtype = block.norm, conv.weight.dtype
        g, a, b, c = (x.float() for x in (block.gammas, conv.weight, expand.weight, project.weight))
        pairs = (
            (a * (1 + g[0]) * g[2], (conv.bias + g[1] * a.sum(dim=(1, 2, 3))) * g[2]),
            (b * (1 + g[3]), expand.bias + g[4] * b.sum(dim=1)),
            (c * g[5], project.bias * g[5]),
        )
        self.depthwise, self.expand, self.project = ((weight.to(dtype), bias.to(dtype)) for weight, bias in pairs)

    def __call__(self, rows: Rows) -> Tensor:
        h = F.pad(self.norm(rows.x), (1, 1, int(rows.top), int(rows.bottom)), mode="replicate")
        x = rows.inner(rows.x) + F.conv2d(h, *self.depthwise, groups=h.shape[1])
        h = self.norm(x).permute(0, 2, 3, 1)
        h = linear(linear(h, *self.expand, gelu=True), *self.project)
        return x + h.permute(0, 3, 1, 2)


def folded_block(block: nn.Module, x: Tensor) -> Tensor:
    """Fast path of `VQResBlock.forward`."""
    return FoldedBlock(block)(Rows(x, True, True))


class Banded:
    """Runs a layer that needs each row's neighbours over the bands of an image, from top to bottom."""

    def __init__(self, layer: Callable[[Rows], Tensor]):
        self._layer = layer
        self._pending: Tensor | None = None
        self._top = True

    def __call__(self, band: Tensor, last: bool) -> Tensor | None:
        """Returns the output for the rows so far, without the last one unless `last`; None if they are too few."""
        x = band if self._pending is None else torch.cat([self._pending, band], dim=2)
        if not last and x.shape[2] <= (1 if self._top else 2):
            self._pending = x
            return None
        rows = Rows(x, self._top, last)
        self._pending, self._top = x[:, :, -2:].clone(), False  # a view would keep the whole band in memory
        return self._layer(rows)


def _banded(layer: nn.Module) -> Callable[[Tensor, bool], Tensor | None]:
    if hasattr(layer, "gammas"):  # a VQResBlock
        return Banded(FoldedBlock(layer))
    if isinstance(layer, nn.ConvTranspose2d):
        return Banded(lambda rows: rows.inner(layer(rows.x), scale=2))
    return lambda band, last: layer(band)


def band_height(count: int, height: int, width: int, cpu: bool) -> int:
    """Returns how many rows of `count` latents [height, width] are decoded at once; on a CPU they fit its cache."""
    return min(height, max(4, (2**12 if cpu else 2**13) // (count * width))) if kernels_enabled() else height


def decode_in_bands(vqgan: Any, latents: Tensor) -> Tensor | None:
    """Fast path of `VQGAN.decode`; returns None where gradients are needed.

    Each band passes through all layers before the next one starts: memory does not grow with the image's height, and a
    band stays in the processor's cache.
    """
    needs_grad = torch.is_grad_enabled() and (latents.requires_grad or vqgan.out_block[0].weight.requires_grad)
    if needs_grad or torch.compiler.is_compiling():
        return None
    count, _, height, width = latents.shape
    scale = 2**vqgan.params.levels
    latents = latents.contiguous(memory_format=torch.channels_last)
    images = latents.new_empty(count, 3, scale * height, scale * width)
    rows = band_height(count, height, width, latents.device.type == "cpu")
    layers, done = [_banded(layer) for layer in (*vqgan.up_blocks, vqgan.out_block)], 0
    for top in range(0, height, rows):
        x: Tensor | None = latents[:, :, top : top + rows]
        for layer in layers:
            x = None if x is None else layer(x, top + rows >= height)
        if x is not None:
            images[:, :, done : done + x.shape[2]] = x
            done += x.shape[2]
    return images
