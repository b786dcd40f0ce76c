"""Stage A: the f4 VQGAN between pixels and latents ("Paella VQ"; Würstchen, arXiv 2306.00637, section 3.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..common.dataclass_config import option
from ..kernels.dispatch import accelerated_by
from ..kernels.vqgan import decode_in_bands, folded_block
from .init import xavier_init
from .layers import ChannelNorm, channels_last, nearest_codes
from .operations import Operations


@dataclass(frozen=True)
class VQGANParams:
    """Sizes of a VQGAN; the defaults are the released model's."""

    levels: int = option(2, "number of levels, each halving the side")
    bottleneck_blocks: int = option(12, "blocks at the coarsest level")
    c_hidden: int = option(384, "channels of the coarsest level")
    c_latent: int = option(4, "channels of the latents")
    codebook_size: int = option(8192, "number of codes")
    scale_factor: float = option(0.3764, "Stage B works on latents divided by this")


class Quantized(NamedTuple):
    """Result of vector quantisation."""

    latents: Tensor  # [B, 4, h, w], the nearest codes; gradients pass straight through
    indices: Tensor  # [B, h, w]
    codebook_loss: Tensor  # scalar
    commit_loss: Tensor  # scalar


class Codebook(nn.Module):
    """Vector quantiser (arXiv 1711.00937, section 3) over the channels of NCHW latents."""

    def __init__(self, size: int, c_latent: int, operations: Any = Operations, **factory: Any):
        super().__init__()
        self.codebook = operations.Embedding(size, c_latent, **factory)

    def forward(self, x: Tensor, weights: Tensor | None = None) -> Quantized:
        """Quantises x [B, c, h, w]; `weights` [B, 1, h, w] are factors of the latents' losses."""
        vectors = x.permute(0, 2, 3, 1)
        indices = nearest_codes(vectors.flatten(0, 2).detach(), self.codebook.weight.detach()).view(vectors.shape[:3])
        codes = self.codebook(indices).permute(0, 3, 1, 2)
        if weights is None:
            codebook_loss, commit_loss = F.mse_loss(codes, x.detach()), F.mse_loss(x, codes.detach())
        else:
            codebook_loss = (weights * (codes - x.detach()) ** 2).mean()
            commit_loss = (weights * (x - codes.detach()) ** 2).mean()
        return Quantized(x + (codes - x).detach(), indices, codebook_loss, commit_loss)


class VQResBlock(nn.Module):
    """Depthwise and pointwise residual branches, each modulated by three scalars of `gammas`."""

    def __init__(self, c: int, operations: Any = Operations, **factory: Any):
        super().__init__()
        self.norm = ChannelNorm()
        self.depthwise = nn.Sequential(
            nn.ReplicationPad2d(1), operations.Conv2d(c, c, kernel_size=3, groups=c, **factory)
        )
        self.channelwise = nn.Sequential(
            operations.Linear(c, c * 4, **factory), nn.GELU(), operations.Linear(c * 4, c, **factory)
        )
        self.gammas = nn.Parameter(torch.zeros(6, device=factory.get("device"), dtype=factory.get("dtype")))

    @accelerated_by(folded_block)
    def forward(self, x: Tensor) -> Tensor:
        g = self.gammas
        h = self.norm(x) * (1 + g[0]) + g[1]
        x = x + self.depthwise(h) * g[2]
        h = self.norm(x) * (1 + g[3]) + g[4]
        return x + self.channelwise(h.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) * g[5]


class VQGAN(nn.Module):
    """Maps images in [0, 1] to latents in codebook units and back."""

    def __init__(self, params: VQGANParams, *, operations: Any = Operations, device: Any = None, dtype: Any = None):
        super().__init__()
        p, factory = params, {"device": device, "dtype": dtype}
        self.params = params
        widths = [p.c_hidden >> i for i in reversed(range(p.levels))]  # from fine to coarse

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
        """Initialises the weights as the original does before training."""
        for block in self.modules():
            if isinstance(block, VQResBlock):
                block.apply(xavier_init)
                nn.init.zeros_(block.gammas)
        bound = 1 / self.params.codebook_size
        nn.init.uniform_(self.vquantizer.codebook.weight, -bound, bound)

    def encode(self, images: Tensor) -> Tensor:
        """Maps images [B, 3, H, W] in [0, 1] to latents [B, 4, H/4, W/4] in codebook units, not quantised."""
        multiple = 2**self.params.levels
        height, width = images.shape[-2:]
        if height % multiple or width % multiple:
            raise ValueError(f"the image has {width}x{height} pixels: its sides must be multiples of {multiple}")
        return self.down_blocks(channels_last(self.in_block(images))).contiguous()

    def quantize(self, latents: Tensor, weights: Tensor | None = None) -> Quantized:
        """Replaces latents [B, 4, h, w] in codebook units by the nearest codes; `weights` as in `Codebook`."""
        return self.vquantizer(latents, weights)

    def indices_to_latents(self, indices: Tensor) -> Tensor:
        """Looks up the codes [B, 4, h, w] of indices [B, h, w]."""
        return self.vquantizer.codebook(indices).permute(0, 3, 1, 2)

    @accelerated_by(decode_in_bands)
    def decode(self, latents: Tensor) -> Tensor:
        """Maps latents [B, 4, h, w] in codebook units to images [B, 3, 4h, 4w], roughly in [0, 1], not clamped."""
        return self.out_block(self.up_blocks(channels_last(latents))).contiguous()
