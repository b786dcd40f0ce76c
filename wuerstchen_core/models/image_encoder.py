"""The semantic compressor: EfficientNetV2 (arXiv 2104.00298) and a 1x1 mapper (Würstchen, section 3.2)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..common.geometry import semantic_view_size

# torchvision is imported where a network is built: it takes longer to import than all the rest of the package.

FUSED, MB = "fused", "mb"
Stage = tuple[str, int, int, int, int, int, int]  # kind, expansion, kernel, stride, channels in, out, layers

EFFICIENTNET_V2_S: tuple[Stage, ...] = (
    (FUSED, 1, 3, 1, 24, 24, 2),
    (FUSED, 4, 3, 2, 24, 48, 4),
    (FUSED, 4, 3, 2, 48, 64, 4),
    (MB, 4, 3, 2, 64, 128, 6),
    (MB, 6, 3, 1, 128, 160, 9),
    (MB, 6, 3, 2, 160, 256, 15),
)
EFFICIENTNET_V2_L: tuple[Stage, ...] = (
    (FUSED, 1, 3, 1, 32, 32, 4),
    (FUSED, 4, 3, 2, 32, 64, 7),
    (FUSED, 4, 3, 2, 64, 96, 7),
    (MB, 4, 3, 2, 96, 192, 10),
    (MB, 6, 3, 1, 192, 224, 19),
    (MB, 6, 3, 2, 224, 384, 25),
    (MB, 6, 3, 1, 384, 640, 7),
)

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class ImageEncoderParams:
    """Stage table and widths; the defaults are v2's (v1: EFFICIENTNET_V2_L)."""

    stages: tuple[Stage, ...] = EFFICIENTNET_V2_S
    last_channel: int = 1280
    c_latent: int = 16


class ImageEncoder(nn.Module):
    """Pictures, as `semantic_view` gives them, to Stage C latents (raw: without the prior's (x + 1) / 42)."""

    def __init__(self, params: ImageEncoderParams, *, device: Any = None, dtype: Any = None):
        from torchvision.models.efficientnet import EfficientNet, FusedMBConvConfig, MBConvConfig

        super().__init__()
        self.params = params
        kinds = {FUSED: FusedMBConvConfig, MB: MBConvConfig}
        # EfficientNetV2 knows no stochastic depth at inference, so the probability is left at its default.
        self.backbone = EfficientNet(
            [kinds[kind](*numbers) for kind, *numbers in params.stages],
            dropout=0.0,
            last_channel=params.last_channel,
            norm_layer=partial(nn.BatchNorm2d, eps=1e-3),
        ).features
        self.mapper = nn.Sequential(
            nn.Conv2d(params.last_channel, params.c_latent, kernel_size=1, bias=False),
            nn.BatchNorm2d(params.c_latent),
        )
        self.to(device=device, dtype=dtype)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images [B, 3, H, W] to latents [B, 16, H/32, W/32]."""
        return self.mapper(self.backbone(images))


def semantic_view(images: Tensor) -> Tensor:
    """Images [B, 3, H, W] in [0, 1] as the encoder sees them: 3/4 of the size, in multiples of 32, ImageNet scale."""
    height, width = semantic_view_size(images.shape[-2]), semantic_view_size(images.shape[-1])
    images = F.interpolate(images, size=(height, width), mode="bilinear", antialias=True, align_corners=False)
    mean = images.new_tensor(IMAGENET_MEAN)[:, None, None]
    std = images.new_tensor(IMAGENET_STD)[:, None, None]
    return (images - mean) / std
