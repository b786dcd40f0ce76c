"""Stage B of v1: a U-Net over Stage A tokens ("Paella", arXiv 2211.07292; Würstchen, arXiv 2306.00637, section 3.2)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..common.dataclass_config import option
from .feature_reuse import DeepFeatures
from .layers import EPS, ChannelNorm, timestep_embedding
from .operations import Operations
from .unet import UNet, UNetParams


@dataclass(frozen=True)
class TokenDecoderParams(UNetParams):
    """Sizes of a TokenDecoder; the defaults are v1's."""

    c_in: int = option(256, "channels of the input")
    c_out: int = option(256, "channels of the output")
    num_labels: int = option(8192, "codes of Stage A")
    c_r: int = option(64, "channels of the time embedding")
    patch_size: int = option(2, "side in latent pixels of the finest level's tokens")
    c_cond: int = option(1024, "channels of the conditioning")
    c_hidden: tuple[int, ...] = option((640, 1280, 1280), "channels of each level")
    nhead: tuple[int, ...] = option((-1, 16, 16), "attention heads of each level; -1: none")
    blocks: tuple[int, ...] = option((4, 12, 4), "repetitions of each level's blocks")
    level_config: tuple[str, ...] = option(
        ("CT", "CTA", "CTA"), "blocks of each level: C convolution, T time, A attention"
    )
    effnet_embd: int = option(16, "channels of the image features")
    byt5_embd: int = option(1024, "width of the text states (of CLIP-H; the name is from an earlier ByT5)")
    kernel_size: int = option(3, "side of the convolutions' kernels")
    self_attn: bool = option(True, "tokens attend to each other too")
    dropout: float = option(0.0, "dropout (the original trains with 0.1)")


class TokenDecoder(UNet):
    """Predicts the clean Stage A tokens from noised ones, Stage C latents and text states."""

    def __init__(
        self, params: TokenDecoderParams, *, operations: Any = Operations, device: Any = None, dtype: Any = None
    ):
        super().__init__()
        p, factory = params, {"device": device, "dtype": dtype}
        self.params = params
        self.byt5_mapper = operations.Linear(p.byt5_embd, p.c_cond, **factory)
        self.effnet_mapper = operations.Linear(p.effnet_embd, p.c_cond, **factory)
        self.in_mapper = nn.Sequential(operations.Embedding(p.num_labels, p.c_in, **factory))
        self.build(p.c_in, p.c_out, (0,) * len(p.c_hidden), v1=True, operations=operations, **factory)
        self.out_mapper = nn.Sequential(
            ChannelNorm(), operations.Conv2d(p.c_out, p.num_labels, kernel_size=1, bias=False, **factory)
        )

    def init_weights(self) -> None:
        """Initialises the weights as the original does before training."""
        self.init_unet((self.byt5_mapper, self.effnet_mapper))
        codes = self.in_mapper[0].get_parameter("weight")
        nn.init.normal_(codes, std=math.sqrt(1 / self.params.num_labels))
        with torch.no_grad():  # a copy: the two are trained separately
            self.out_mapper[1].get_parameter("weight").copy_(codes[:, :, None, None])

    def condition(self, prior_latents: Tensor, text: Tensor) -> Tensor:
        """Maps Stage C latents [B, 16, h, w] and text [B, M, byt5_embd] to one sequence [B, h w + M, c_cond]."""
        features = self.effnet_mapper(prior_latents.flatten(2).transpose(1, 2).to(text.dtype))
        return F.layer_norm(torch.cat([features, self.byt5_mapper(text)], dim=1), (self.params.c_cond,), eps=EPS)

    def forward(
        self,
        tokens: Tensor,
        t: Tensor,
        prior_latents: Tensor,
        text: Tensor,
        positions: Tensor | None = None,
        text_mask: Tensor | None = None,
        deep: DeepFeatures | None = None,
    ) -> Tensor:
        """Returns logits [B, num_labels, H, W] of the clean tokens.

        They depend on tokens [B, H, W] noised to times t [B] in [0, 1], prior_latents [B, 16, h, w] and text
        [B, 77 n, byt5_embd], which is padding where `text_mask` [B, 77 n] is False. H and W must be multiples of
        `params.multiple`. With `positions` [B, n], indices into the H W tokens of each image, only their logits are
        returned: [B, num_labels, n, 1]. `deep` as in `UNet.run`.
        """
        p = self.params
        self.check_size(tokens)
        time = timestep_embedding(t, p.c_r).to(text.dtype)
        codes = self.in_mapper[0](tokens).to(text.dtype)
        x = F.layer_norm(codes, (p.c_in,), eps=EPS).permute(0, 3, 1, 2)
        cond = self.condition(prior_latents, text)
        if text_mask is not None:
            text_mask = F.pad(text_mask, (cond.shape[1] - text.shape[1], 0), value=True)
        x = self.run(x, time, cond, mask=text_mask, deep=deep)
        if positions is not None:
            x = x.flatten(2).gather(2, positions[:, None].expand(-1, p.c_out, -1))[..., None]
        return self.out_mapper(x).contiguous()
