"""Stage B of v2: a diffusion U-Net over Stage A latents ("DiffNeXt"; Würstchen, arXiv 2306.00637, section 3.2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import (
    EPS,
    AttnBlock,
    ChannelNorm,
    FeedForwardBlock,
    ResBlock,
    TimestepBlock,
    channels_last,
    init_blocks,
    timestep_embedding,
    xavier_init,
)


@dataclass(frozen=True)
class DecoderParams:
    """Sizes of a Decoder, one entry a level from fine to coarse; the defaults are v2's.

    A level repeats its pattern of blocks: C(onvolution), T(ime), A(ttention), F(eed-forward).
    """

    c_in: int = 4
    c_out: int = 4
    c_r: int = 64
    patch_size: int = 2
    c_cond: int = 1024
    c_hidden: tuple[int, ...] = (320, 640, 1280, 1280)
    nhead: tuple[int, ...] = (-1, 10, 20, 20)
    blocks: tuple[int, ...] = (4, 4, 14, 4)
    level_config: tuple[str, ...] = ("CT", "CTA", "CTA", "CTA")
    inject_effnet: tuple[bool, ...] = (False, True, True, True)
    effnet_embd: int = 16
    clip_embd: int = 1024
    kernel_size: int = 3
    self_attn: bool = True
    dropout: float = 0.0  # the original trains with 0.1

    @property
    def multiple(self) -> int:
        """Latent sides must be multiples of this."""
        return self.patch_size * 2 ** (len(self.c_hidden) - 1)


def resize_prior_latents(latents: Tensor, size: tuple[int, int]) -> Tensor:
    """Bicubic, antialiased resize of Stage C latents to a level's size, in fp32 whatever their dtype."""
    return F.interpolate(latents.float(), size=size, mode="bicubic", antialias=True, align_corners=True)


class Decoder(nn.Module):
    """Predicts the noise in Stage A latents from Stage C latents and text states."""

    def __init__(self, params: DecoderParams, *, operations: Any = nn, device: Any = None, dtype: Any = None):
        super().__init__()
        p = params
        self.params = params
        self._ops: dict[str, Any] = {"operations": operations, "device": device, "dtype": dtype}
        factory = {"device": device, "dtype": dtype}
        levels = range(len(p.c_hidden))

        self.clip_mapper = operations.Linear(p.clip_embd, p.c_cond, **factory)
        mappers: list[Any] = [
            operations.Conv2d(p.effnet_embd, p.c_cond, kernel_size=1, **factory) if inject else None
            for inject in (*p.inject_effnet, *reversed(p.inject_effnet))
        ]
        self.effnet_mappers = nn.ModuleList(mappers)
        self.embedding = nn.Sequential(
            nn.PixelUnshuffle(p.patch_size),
            operations.Conv2d(p.c_in * p.patch_size**2, p.c_hidden[0], kernel_size=1, **factory),
            ChannelNorm(),
        )
        self.down_blocks = nn.ModuleList()
        for i in levels:
            level = nn.ModuleList()
            if i > 0:
                down = operations.Conv2d(p.c_hidden[i - 1], p.c_hidden[i], kernel_size=2, stride=2, **factory)
                level.append(nn.Sequential(ChannelNorm(), down))
            level.extend(self._blocks(i, c_skip=0))
            self.down_blocks.append(level)
        self.up_blocks = nn.ModuleList()
        for i in reversed(levels):
            level = self._blocks(i, c_skip=p.c_hidden[i] if i < levels[-1] else 0)
            if i > 0:
                up = operations.ConvTranspose2d(p.c_hidden[i], p.c_hidden[i - 1], kernel_size=2, stride=2, **factory)
                level.append(nn.Sequential(ChannelNorm(), up))
            self.up_blocks.append(level)
        self.clf = nn.Sequential(
            ChannelNorm(),
            operations.Conv2d(p.c_hidden[0], 2 * p.c_out * p.patch_size**2, kernel_size=1, **factory),
            nn.PixelShuffle(p.patch_size),
        )
        del self._ops

    def _blocks(self, level: int, c_skip: int) -> nn.ModuleList:
        """The blocks of one level; the first convolution also takes `c_skip` channels of the way down."""
        p, ops = self.params, self._ops
        c, blocks = p.c_hidden[level], nn.ModuleList()
        for repeat in range(p.blocks[level]):
            for position, kind in enumerate(p.level_config[level]):
                if kind == "C":
                    extra = c_skip if repeat == position == 0 else 0
                    extra += p.c_cond if p.inject_effnet[level] else 0
                    blocks.append(ResBlock(c, extra, p.kernel_size, p.dropout, **ops))
                elif kind == "T":
                    blocks.append(TimestepBlock(c, p.c_r, **ops))
                elif kind == "A":
                    blocks.append(AttnBlock(c, p.c_cond, p.nhead[level], p.self_attn, p.dropout, **ops))
                elif kind == "F":
                    blocks.append(FeedForwardBlock(c, p.dropout, **ops))
                else:
                    raise ValueError(f"block kind {kind!r} is unknown: a level is made of C, T, A and F")
        return blocks

    def init_weights(self) -> None:
        """Initialise as the original does before training."""
        self.apply(xavier_init)
        for layer in (*self.effnet_mappers, self.clip_mapper):
            if layer is not None:
                nn.init.normal_(layer.weight, std=0.02)
        nn.init.xavier_uniform_(self.embedding[1].get_parameter("weight"), 0.02)
        nn.init.zeros_(self.clf[1].get_parameter("weight"))
        for level in (*self.down_blocks, *self.up_blocks):
            init_blocks(level, sum(self.params.blocks))

    def _level(
        self, blocks: Any, x: Tensor, time: Tensor, text: Tensor, injected: Tensor | None, skip: Tensor | None
    ) -> Tensor:
        """Run one level; `injected` joins every ResBlock, `skip` (from the way down) only the first."""
        for block in blocks:
            if isinstance(block, ResBlock):
                extra = [y for y in (skip, injected) if y is not None]
                x = block(x, torch.cat(extra, dim=1) if extra else None)
                skip = None
            elif isinstance(block, AttnBlock):
                x = block(x, text)
            elif isinstance(block, TimestepBlock):
                x = block(x, time)
            else:  # feed-forward, or the change of resolution between two levels
                x = block(x)
        return x

    def _inject(self, index: int, prior_latents: Tensor, size: tuple[int, int], dtype: torch.dtype) -> Tensor | None:
        mapper = self.effnet_mappers[index]
        if mapper is None:
            return None
        return mapper(channels_last(resize_prior_latents(prior_latents, size).to(dtype)))

    def forward_ab(self, latents: Tensor, t: Tensor, prior_latents: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """The two maps (a, b), fp32, from which the noise is (latents - a) / b; shapes as in `forward`."""
        p = self.params
        time = timestep_embedding(t, p.c_r).to(text.dtype)
        text = F.layer_norm(self.clip_mapper(text), (p.c_cond,), eps=EPS)
        x = self.embedding[0](latents)
        x = self.embedding[2](self.embedding[1](channels_last(x)))
        depth = len(p.c_hidden)
        size = tuple(x.shape[-2:])
        sizes = [(size[0] >> i, size[1] >> i) for i in range(depth)]
        skips: list[Tensor] = []
        for i, blocks in enumerate(self.down_blocks):
            injected = self._inject(i, prior_latents, sizes[i], x.dtype)
            x = self._level(blocks, x, time, text, injected, None)
            skips.insert(0, x)
        for i, blocks in enumerate(self.up_blocks):
            injected = self._inject(depth + i, prior_latents, sizes[depth - 1 - i], x.dtype)
            x = self._level(blocks, x, time, text, injected, skips[i] if i > 0 else None)
        a, b = self.clf(x).float().chunk(2, dim=1)
        return a, b.sigmoid() * (1 - 2e-3) + 1e-3

    def forward(self, latents: Tensor, t: Tensor, prior_latents: Tensor, text: Tensor) -> Tensor:
        """Noise in latents [B, 4, H, W] at times t [B], given prior_latents [B, 16, h, w] and text [B, 77, clip_embd].

        H and W must be multiples of `params.multiple`.
        """
        multiple = self.params.multiple
        if latents.shape[-1] % multiple or latents.shape[-2] % multiple:
            raise ValueError(
                f"Stage B latents of {latents.shape[-1]}x{latents.shape[-2]} cannot be halved often enough: "
                f"both sides must be multiples of {multiple} ({multiple * 4} pixels)"
            )
        a, b = self.forward_ab(latents, t, prior_latents, text)
        return ((latents.float() - a) / b).to(latents.dtype).contiguous()
