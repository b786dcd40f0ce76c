"""Stage A: the f4 VQGAN between pixels and latents ("Paella VQ"; Würstchen, arXiv 2306.00637, section 3.1)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.linear import Operations, product
from .init import xavier_init
from .layers import channels_last, nearest_codes
from .mlp import EPS


@dataclass(frozen=True)
class VQGANParams:
    """Sizes of a VQGAN; the defaults are the released model's."""

    levels: int = 2
    bottleneck_blocks: int = 12
    c_hidden: int = 384
    c_latent: int = 4
    codebook_size: int = 8192
    scale_factor: float = 0.3764  # Stage B works on latents divided by this


class Quantized(NamedTuple):
    """Latents snapped to the codebook, the code of each, and the losses that train them (scalars)."""

    latents: Tensor  # [B, 4, h, w]; gradients pass straight through
    indices: Tensor  # [B, h, w]
    codebook_loss: Tensor
    commit_loss: Tensor


class Codebook(nn.Module):
    """Vector quantiser (arXiv 1711.00937, section 3) over the channels of NCHW latents."""

    def __init__(self, size: int, c_latent: int, operations: Any = Operations, **factory: Any):
        super().__init__()
        self.codebook = operations.Embedding(size, c_latent, **factory)

    def forward(self, x: Tensor) -> Quantized:
        rows = x.permute(0, 2, 3, 1)
        indices = nearest_codes(rows.flatten(0, 2).detach(), self.codebook.weight.detach()).view(rows.shape[:3])
        codes = self.codebook(indices).permute(0, 3, 1, 2)
        codebook_loss = F.mse_loss(codes, x.detach())
        commit_loss = F.mse_loss(x, codes.detach())
        return Quantized(x + (codes - x).detach(), indices, codebook_loss, commit_loss)


class Rows(NamedTuple):
    """Rows [B, c, n, w] of a picture, with a row of what is above and below, where they are not at its edges."""

    x: Tensor
    top: bool  # whether they begin at the picture's first row
    bottom: bool  # whether they end at its last

    def inner(self, x: Tensor, scale: int = 1) -> Tensor:
        """`x`, made of these rows at `scale` times their resolution, without what was made of the neighbours."""
        return x[:, :, 0 if self.top else scale : None if self.bottom else -scale]


class Bands:
    """A layer that needs each row's neighbours, over a picture that comes in bands of rows from top to bottom."""

    def __init__(self, layer: Callable[[Rows], Tensor]):
        self._layer = layer
        self._held: Tensor | None = None
        self._top = True

    def __call__(self, new: Tensor, last: bool) -> Tensor | None:
        """What the layer makes of the rows so far, without the last of them unless they are all; None: nothing yet."""
        x = new if self._held is None else torch.cat([self._held, new], dim=2)
        if not last and x.shape[2] <= (1 if self._top else 2):
            self._held = x
            return None
        rows = Rows(x, self._top, last)
        self._held, self._top = x[:, :, -2:].clone(), False  # a view would keep the whole
        return self._layer(rows)


class Folded(NamedTuple):
    """The weights of a VQResBlock, with its gammas in them."""

    depthwise: tuple[Tensor, Tensor]
    expand: tuple[Tensor, Tensor]
    project: tuple[Tensor, Tensor]


class VQResBlock(nn.Module):
    """Depthwise and pointwise residual branches, each modulated by three scalars of `gammas`."""

    def __init__(self, c: int, operations: Any = Operations, **factory: Any):
        super().__init__()
        self.depthwise = nn.Sequential(
            nn.ReplicationPad2d(1), operations.Conv2d(c, c, kernel_size=3, groups=c, **factory)
        )
        self.channelwise = nn.Sequential(
            operations.Linear(c, c * 4, **factory), nn.GELU(), operations.Linear(c * 4, c, **factory)
        )
        self.gammas = nn.Parameter(torch.zeros(6, device=factory.get("device"), dtype=factory.get("dtype")))

    def folded(self) -> Folded:
        """The weights that do without the gammas: these are scales and shifts before and after linear maps."""
        conv: Any = self.depthwise[1]
        expand: Any = self.channelwise[0]
        project: Any = self.channelwise[2]
        dtype = conv.weight.dtype
        g, a, b, c = (x.float() for x in (self.gammas, conv.weight, expand.weight, project.weight))
        pairs = (
            (a * (1 + g[0]) * g[2], (conv.bias + g[1] * a.sum(dim=(1, 2, 3))) * g[2]),
            (b * (1 + g[3]), expand.bias + g[4] * b.sum(dim=1)),
            (c * g[5], project.bias * g[5]),
        )
        return Folded(*((weight.to(dtype), bias.to(dtype)) for weight, bias in pairs))

    def forward(self, x: Tensor) -> Tensor:
        return self.rows(Rows(x, True, True), self.folded())

    def rows(self, given: Rows, weights: Folded) -> Tensor:
        """What the block makes of rows whose neighbours are known."""
        x = given.x
        c = x.shape[1]
        h = F.layer_norm(x.permute(0, 2, 3, 1), (c,), eps=EPS).permute(0, 3, 1, 2)
        h = F.pad(h, (1, 1, int(given.top), int(given.bottom)), mode="replicate")
        x = (given.inner(x) + F.conv2d(h, *weights.depthwise, groups=c)).permute(0, 2, 3, 1)
        h = F.layer_norm(x, (c,), eps=EPS)
        h = product(product(h, *weights.expand, gelu=True), *weights.project)
        return (x + h).permute(0, 3, 1, 2)


def band_rows(count: int, width: int, cpu: bool) -> int:
    """How many rows of `count` latents of a width `VQGAN.decode` works on at once: on a CPU what fits its cache."""
    return max(4, (2**12 if cpu else 2**13) // (count * width))


def _in_bands(layer: nn.Module) -> Callable[[Tensor, bool], Tensor | None]:
    """A layer of the decoder, over a picture that comes in bands."""
    if isinstance(layer, VQResBlock):
        return Bands(partial(layer.rows, weights=layer.folded()))
    if isinstance(layer, nn.ConvTranspose2d):
        return Bands(lambda rows: rows.inner(layer(rows.x), scale=2))
    return lambda x, last: layer(x)


class VQGAN(nn.Module):
    """Pixels in [0, 1] to latents in codebook units and back."""

    def __init__(self, params: VQGANParams, *, operations: Any = Operations, device: Any = None, dtype: Any = None):
        super().__init__()
        p, factory = params, {"device": device, "dtype": dtype}
        self.params = params
        widths = [p.c_hidden >> i for i in reversed(range(p.levels))]  # fine to coarse

        self.in_block = nn.Sequential(
            nn.PixelUnshuffle(2), operations.Conv2d(3 * 4, widths[0], kernel_size=1, **factory)
        )
        down: list[nn.Module] = []
        for i, c in enumerate(widths):
            if i > 0:
                down.append(operations.Conv2d(widths[i - 1], c, kernel_size=4, stride=2, padding=1, **factory))
            down.append(VQResBlock(c, operations, **factory))
        down.append(
            nn.Sequential(
                operations.Conv2d(widths[-1], p.c_latent, kernel_size=1, bias=False, **factory),
                nn.BatchNorm2d(p.c_latent, **factory),
            )
        )
        self.down_blocks = nn.Sequential(*down)
        self.vquantizer = Codebook(p.codebook_size, p.c_latent, operations, **factory)
        up: list[nn.Module] = [nn.Sequential(operations.Conv2d(p.c_latent, widths[-1], kernel_size=1, **factory))]
        for i, c in enumerate(reversed(widths)):
            up.extend(VQResBlock(c, operations, **factory) for _ in range(p.bottleneck_blocks if i == 0 else 1))
            if i < p.levels - 1:
                up.append(operations.ConvTranspose2d(c, c // 2, kernel_size=4, stride=2, padding=1, **factory))
        self.up_blocks = nn.Sequential(*up)
        self.out_block = nn.Sequential(
            operations.Conv2d(widths[0], 3 * 4, kernel_size=1, **factory), nn.PixelShuffle(2)
        )

    def init_weights(self) -> None:
        """Initialise as the original does before training."""
        for block in self.modules():
            if isinstance(block, VQResBlock):
                block.apply(xavier_init)
                nn.init.zeros_(block.gammas)
        bound = 1 / self.params.codebook_size
        nn.init.uniform_(self.vquantizer.codebook.weight, -bound, bound)

    def encode(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] to latents [B, 4, H/4, W/4] in codebook units, not quantised."""
        multiple = 2**self.params.levels
        if images.shape[-1] % multiple or images.shape[-2] % multiple:
            raise ValueError(
                f"an image of {images.shape[-1]}x{images.shape[-2]} pixels cannot be encoded: "
                f"both sides must be multiples of {multiple}"
            )
        return self.down_blocks(channels_last(self.in_block(images))).contiguous()

    def quantize(self, latents: Tensor) -> Quantized:
        """Snap latents [B, 4, h, w] in codebook units to the nearest codes."""
        return self.vquantizer(latents)

    def latents_of(self, indices: Tensor) -> Tensor:
        """Codes [B, h, w] to the latents [B, 4, h, w] that they stand for."""
        return self.vquantizer.codebook(indices).permute(0, 3, 1, 2)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, 4, h, w] in codebook units to images [B, 3, 4h, 4w], about [0, 1], not clamped.

        Without gradients it works in bands of rows, that go through all layers one after the other: what is held does
        not grow with the picture's height, and little leaves the processor's cache.
        """
        latents = channels_last(latents)
        wanted = torch.is_grad_enabled() and (latents.requires_grad or self.out_block[0].weight.requires_grad)
        if wanted or torch.compiler.is_compiling():
            return self.out_block(self.up_blocks(latents)).contiguous()
        count, _, height, width = latents.shape
        scale = 2**self.params.levels
        images = latents.new_empty(count, 3, scale * height, scale * width)
        rows = band_rows(count, width, latents.device.type == "cpu")
        layers, done = [_in_bands(layer) for layer in (*self.up_blocks, self.out_block)], 0
        for top in range(0, height, rows):
            x: Tensor | None = latents[:, :, top : top + rows]
            for layer in layers:
                x = None if x is None else layer(x, top + rows >= height)
            if x is not None:
                images[:, :, done : done + x.shape[2]] = x
                done += x.shape[2]
        return images

    def decode_indices(self, indices: Tensor) -> Tensor:
        """Codes [B, h, w] to images [B, 3, 4h, 4w]."""
        return self.decode(self.latents_of(indices))
