"""The semantic compressor: EfficientNetV2 (arXiv 2104.00298) and a 1x1 mapper (Würstchen, section 3.2)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..common.geometry import prior_side

# torchvision takes longer to import than the rest of the package, so it is imported where a network is built.

FUSED, MB = "fused", "mb"
EfficientNetStage = tuple[str, int, int, int, int, int, int]  # kind, expansion, kernel, stride, c_in, c_out, layers

EFFICIENTNET_V2_S: tuple[EfficientNetStage, ...] = (
    (FUSED, 1, 3, 1, 24, 24, 2),
    (FUSED, 4, 3, 2, 24, 48, 4),
    (FUSED, 4, 3, 2, 48, 64, 4),
    (MB, 4, 3, 2, 64, 128, 6),
    (MB, 6, 3, 1, 128, 160, 9),
    (MB, 6, 3, 2, 160, 256, 15),
)
EFFICIENTNET_V2_L: tuple[EfficientNetStage, ...] = (
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

    stages: tuple[EfficientNetStage, ...] = EFFICIENTNET_V2_S
    last_channel: int = 1280
    c_latent: int = 16


class ImageEncoder(nn.Module):
    """Maps the images of `semantic_view` to Stage C features (before the prior's (x + 1) / 42)."""

    def __init__(self, params: ImageEncoderParams, *, device: Any = None, dtype: Any = None):
        from torchvision.models.efficientnet import EfficientNet, FusedMBConvConfig, MBConvConfig

        super().__init__()
        self.params = params
        kinds = {FUSED: FusedMBConvConfig, MB: MBConvConfig}
        # Stochastic depth does nothing at inference; its probability stays at the default.
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
        """Maps normalised images [B, 3, H, W] to features [B, 16, H/32, W/32]."""
        return self.mapper(self.backbone(images))


def semantic_view(images: Tensor) -> Tensor:
    """Prepares images [B, 3, H, W] in [0, 1] for the encoder: 3/4 of the size in multiples of 32, ImageNet scale."""
    size = [32 * prior_side(side) for side in images.shape[-2:]]
    images = F.interpolate(images, size=size, mode="bilinear", antialias=True, align_corners=False)
    mean = images.new_tensor(IMAGENET_MEAN)[:, None, None]
    std = images.new_tensor(IMAGENET_STD)[:, None, None]
    return (images - mean) / std
