"""Stage B of v2: a diffusion U-Net over Stage A latents ("DiffNeXt"; Würstchen, arXiv 2306.00637, section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..common.dataclass_config import option
from ..kernels.mlp import MappedLatents
from .feature_reuse import DeepFeatures
from .layers import EPS, channels_last, timestep_embedding
from .operations import Operations
from .unet import UNet, UNetParams


@dataclass(frozen=True)
class DecoderParams(UNetParams):
    """Sizes of a Decoder; the defaults are v2's."""

    c_in: int = option(4, "channels of the input")
    c_out: int = option(4, "channels of the output")
    c_r: int = option(64, "channels of the time embedding")
    patch_size: int = option(2, "side in latent pixels of the finest level's tokens")
    c_cond: int = option(1024, "channels of the conditioning")
    c_hidden: tuple[int, ...] = option((320, 640, 1280, 1280), "channels of each level")
    nhead: tuple[int, ...] = option((-1, 10, 20, 20), "attention heads of each level; -1: none")
    blocks: tuple[int, ...] = option((4, 4, 14, 4), "repetitions of each level's blocks")
    level_config: tuple[str, ...] = option(
        ("CT", "CTA", "CTA", "CTA"), "blocks of each level: C convolution, T time, A attention"
    )
    inject_effnet: tuple[bool, ...] = option((False, True, True, True), "levels that take image features")
    effnet_embd: int = option(16, "channels of the image features")
    clip_embd: int = option(1024, "width of the text states")
    kernel_size: int = option(3, "side of the convolutions' kernels")
    self_attn: bool = option(True, "tokens attend to each other too")
    dropout: float = option(0.0, "dropout (the original trains with 0.1)")


def resize_prior_latents(latents: Tensor, size: Sequence[int]) -> Tensor:
    """Resizes Stage C latents to a level's size: bicubic, antialiased, always in fp32."""
    return F.interpolate(latents.float(), size=size, mode="bicubic", antialias=True, align_corners=True)


class Decoder(UNet):
    """Predicts the noise in Stage A latents from Stage C latents and text states."""

    def __init__(self, params: DecoderParams, *, operations: Any = Operations, device: Any = None, dtype: Any = None):
        super().__init__()
        p, factory = params, {"device": device, "dtype": dtype}
        self.params = params
        self.clip_mapper = operations.Linear(p.clip_embd, p.c_cond, **factory)
        mappers: list[Any] = [
            operations.Conv2d(p.effnet_embd, p.c_cond, kernel_size=1, **factory) if inject else None
            for inject in (*p.inject_effnet, *reversed(p.inject_effnet))
        ]
        self.effnet_mappers = nn.ModuleList(mappers)
        c_injected = tuple(p.c_cond if inject else 0 for inject in p.inject_effnet)
        self.build(p.c_in, 2 * p.c_out, c_injected, v1=False, operations=operations, **factory)

    def init_weights(self) -> None:
        """Initialises the weights as the original does before training."""
        self.init_unet((*filter(None, self.effnet_mappers), self.clip_mapper))

    def forward_ab(
        self,
        latents: Tensor,
        t: Tensor,
        prior_latents: Tensor,
        text: Tensor,
        text_mask: Tensor | None = None,
        deep: DeepFeatures | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Returns maps a and b in fp32, which give the noise (latents - a) / b; shapes as in `forward`."""
        p = self.params
        resized: dict[int, Tensor] = {}  # by resolution

        def inject(level: int, x: Tensor) -> MappedLatents | None:
            mapper, resolution = self.effnet_mappers[level], min(level, 2 * len(p.c_hidden) - 1 - level)
            if mapper is None:
                return None
            if resolution not in resized or resized[resolution].shape[2:] != x.shape[2:]:
                resized[resolution] = channels_last(resize_prior_latents(prior_latents, x.shape[2:]))
            return MappedLatents(resized[resolution], mapper)

        time = timestep_embedding(t, p.c_r).to(text.dtype)
        text = F.layer_norm(self.clip_mapper(text), (p.c_cond,), eps=EPS)
        a, b = self.run(latents, time, text, inject, text_mask, deep).float().chunk(2, dim=1)
        return a, b.sigmoid() * (1 - 2e-3) + 1e-3

    def forward(
        self,
        latents: Tensor,
        t: Tensor,
        prior_latents: Tensor,
        text: Tensor,
        text_mask: Tensor | None = None,
        deep: DeepFeatures | None = None,
    ) -> Tensor:
        """Returns the noise in latents [B, 4, H, W] at times t [B] in [0, 1].

        It depends on prior_latents [B, 16, h, w] and text [B, 77 n, clip_embd], which is padding where `text_mask`
        [B, 77 n] is False. H and W must be multiples of `params.multiple`. `deep` as in `UNet.run`.
        """
        self.check_size(latents)
        a, b = self.forward_ab(latents, t, prior_latents, text, text_mask, deep)
        return ((latents.float() - a) / b).to(latents.dtype).contiguous()
