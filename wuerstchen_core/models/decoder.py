"""Stage B of v2: a diffusion U-Net over Stage A latents ("DiffNeXt"; Würstchen, arXiv 2306.00637, section 3.2)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.mlp import MappedLatents
from .init import xavier_init
from .layers import EPS, ChannelNorm, channels_last, timestep_embedding
from .operations import Operations
from .unet import UNet


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


class Decoder(UNet):
    """Predicts the noise in Stage A latents from Stage C latents and text states."""

    def __init__(self, params: DecoderParams, *, operations: Any = Operations, device: Any = None, dtype: Any = None):
        super().__init__()
        p = params
        self.params = params
        factory = {"device": device, "dtype": dtype}

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
        c_injected = tuple(p.c_cond if inject else 0 for inject in p.inject_effnet)
        self.add_levels(p, c_injected, v1=False, operations=operations, **factory)
        self.clf = nn.Sequential(
            ChannelNorm(),
            operations.Conv2d(p.c_hidden[0], 2 * p.c_out * p.patch_size**2, kernel_size=1, **factory),
            nn.PixelShuffle(p.patch_size),
        )

    def init_weights(self) -> None:
        """Initialise as the original does before training."""
        self.apply(xavier_init)
        for layer in (*self.effnet_mappers, self.clip_mapper):
            if layer is not None:
                nn.init.normal_(layer.weight, std=0.02)
        nn.init.xavier_uniform_(self.embedding[1].get_parameter("weight"), 0.02)
        nn.init.zeros_(self.clf[1].get_parameter("weight"))
        self.init_levels(sum(self.params.blocks))

    def _inject(self, prior_latents: Tensor, index: int, size: tuple[int, int]) -> MappedLatents | None:
        mapper = self.effnet_mappers[index]
        if mapper is None:
            return None
        return MappedLatents(channels_last(resize_prior_latents(prior_latents, size)), mapper)

    def forward_ab(self, latents: Tensor, t: Tensor, prior_latents: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """The two maps (a, b), fp32, from which the noise is (latents - a) / b; shapes as in `forward`."""
        p = self.params
        time = timestep_embedding(t, p.c_r).to(text.dtype)
        text = F.layer_norm(self.clip_mapper(text), (p.c_cond,), eps=EPS)
        x = self.embedding[0](latents)
        x = self.embedding[2](self.embedding[1](channels_last(x)))
        x = self.run_levels(x, time, text, partial(self._inject, prior_latents))
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
