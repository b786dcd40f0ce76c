"""Stage A's decoder in bands of rows, and its blocks with gammas folded into the weights, for every device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .dispatch import kernels_enabled
from .int8 import multiplies_int8, quantize
from .linear import linear


class Rows(NamedTuple):
    """Rows [B, c, n, w] of an image, plus one neighbouring row above and below, except at the image's edges."""

    x: Tensor
    top: bool  # True if x starts at the image's first row
    bottom: bool  # True if x ends at the image's last row

    def inner(self, x: Tensor, scale: int = 1) -> Tensor:
        """Crops `x`, computed from these rows at `scale` times their resolution, by the neighbouring rows."""
        return x[:, :, 0 if self.top else scale : None if self.bottom else -scale]


class FoldedLinear:
    """A linear layer with new factors for its weight and bias, and `shift` added to its input."""

    def __init__(
        self, layer: Any, dtype: torch.dtype, factor: Tensor, bias_factor: Tensor | float, shift: Tensor | float
    ):
        self._packed = layer.packed() if multiplies_int8(layer.bias) else None
        if self._packed is None:
            weight = layer.weights(factor)[0].float()
            self._weight, bias = (weight * factor).to(dtype), layer.bias * bias_factor + shift * weight.sum(dim=1)
        else:
            self._factor = float(factor)
            bias = layer.bias.float() * bias_factor + shift * self._packed.row_sums()
        self._bias = bias.to(dtype)

    def __call__(self, x: Tensor, gelu: bool = False) -> Tensor:
        if self._packed is None:
            return linear(x, self._weight, self._bias, gelu)
        if (quantized := quantize(x.reshape(-1, x.shape[-1]))) is None:
            return x.new_full((*x.shape[:-1], len(self._bias)), torch.nan)
        out = self._packed.product(quantized, x.dtype, bias=self._bias.float(), gelu=gelu, factor=self._factor)
        return out.view(*x.shape[:-1], -1)


class FoldedBlock:
    """A VQResBlock whose gammas, which scale and shift around its linear layers, are folded into the weights."""

    def __init__(self, block: Any):
        conv, g, dtype = block.depthwise[1], block.gammas.float(), block.depthwise[1].weight.dtype
        self.norm, weight = block.norm, conv.weight.float()
        bias = (conv.bias + g[1] * weight.sum(dim=(1, 2, 3))) * g[2]
        self.depthwise = (weight * (1 + g[0]) * g[2]).to(dtype), bias.to(dtype)
        self.expand = FoldedLinear(block.channelwise[0], dtype, factor=1 + g[3], bias_factor=1, shift=g[4])
        self.project = FoldedLinear(block.channelwise[2], dtype, factor=g[5], bias_factor=g[5], shift=0)

    def __call__(self, rows: Rows) -> Tensor:
        h = F.pad(self.norm(rows.x), (1, 1, int(rows.top), int(rows.bottom)), mode="replicate")
        x = rows.inner(rows.x) + F.conv2d(h, *self.depthwise, groups=h.shape[1])
        h = self.project(self.expand(self.norm(x).permute(0, 2, 3, 1), gelu=True))
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
