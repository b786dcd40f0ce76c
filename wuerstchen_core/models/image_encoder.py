"""The semantic compressor: EfficientNetV2 (arXiv 2104.00298) and a 1x1 mapper (Würstchen, section 3.2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..common.dataclass_config import option
from ..common.geometry import prior_side

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
STOCHASTIC_DEPTH = 0.2  # probability, in training, that the last block is left out; proportionally less before it

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class ImageEncoderParams:
    """Stage table and widths; the defaults are v2's (v1: EFFICIENTNET_V2_L)."""

    stages: tuple[EfficientNetStage, ...] = option(
        EFFICIENTNET_V2_S, "kind, expansion, kernel, stride, channels in and out, and layers of each stage"
    )
    last_channel: int = option(1280, "channels of the last convolution")
    c_latent: int = option(16, "channels of the features")


class ConvNorm(nn.Sequential):
    """Convolution, batch norm and, optionally, SiLU."""

    def __init__(
        self,
        c_in: int,
        c_out: int,
        kernel: int = 1,
        stride: int = 1,
        groups: int = 1,
        silu: bool = True,
        **factory: Any,
    ):
        super().__init__(
            nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False, **factory),
            nn.BatchNorm2d(c_out, eps=1e-3, **factory),
        )
        if silu:
            self.append(nn.SiLU(inplace=True))


class SqueezeExcitation(nn.Module):
    """Scales each channel by a function of all channels' means (arXiv 1709.01507)."""

    def __init__(self, c: int, c_hidden: int, **factory: Any):
        super().__init__()
        self.fc1 = nn.Conv2d(c, c_hidden, 1, **factory)
        self.fc2 = nn.Conv2d(c_hidden, c, 1, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.silu(self.fc1(F.adaptive_avg_pool2d(x, 1)))).sigmoid() * x


class MBConv(nn.Module):
    """EfficientNet's residual block: expands the channels, convolves, and projects (arXiv 1801.04381).

    Fused (arXiv 2104.00298), one convolution replaces the expanding and the depthwise one.
    """

    def __init__(
        self,
        kind: str,
        expansion: int,
        kernel: int,
        stride: int,
        c_in: int,
        c_out: int,
        drop: float = 0.0,
        **factory: Any,
    ):
        super().__init__()
        if kind not in (FUSED, MB):
            raise ValueError(f"{kind!r} is no kind of stage: choose {FUSED!r} or {MB!r}")
        hidden, project = c_in * expansion, {"silu": False, **factory}
        expands = hidden != c_in
        if kind == MB:
            layers = [
                *([ConvNorm(c_in, hidden, **factory)] if expands else []),
                ConvNorm(hidden, hidden, kernel, stride, groups=hidden, **factory),
                SqueezeExcitation(hidden, max(1, c_in // 4), **factory),
                ConvNorm(hidden, c_out, **project),
            ]
        elif expands:
            layers = [ConvNorm(c_in, hidden, kernel, stride, **factory), ConvNorm(hidden, c_out, **project)]
        else:
            layers = [ConvNorm(c_in, c_out, kernel, stride, **factory)]
        self.block = nn.Sequential(*layers)
        self.residual = stride == 1 and c_in == c_out
        self.drop = drop

    def forward(self, x: Tensor) -> Tensor:
        h = self.block(x)
        if not self.residual:
            return h
        if self.training and self.drop:  # stochastic depth, for each image
            h = h * h.new_empty(len(h), 1, 1, 1).bernoulli_(1 - self.drop).div_(1 - self.drop)
        return x + h


class ImageEncoder(nn.Module):
    """Maps the images of `semantic_view` to Stage C features (before the prior's (x + 1) / 42).

    The backbone has the parameter names of torchvision's `EfficientNet.features`.
    """

    def __init__(self, params: ImageEncoderParams, *, device: Any = None, dtype: Any = None):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.params = params
        done, count = 0, sum(layers for *_, layers in params.stages)
        stages = []
        for kind, expansion, kernel, stride, c_in, c_out, layers in params.stages:
            blocks = []
            for i in range(layers):
                shape = (stride, c_in, c_out) if i == 0 else (1, c_out, c_out)
                blocks.append(MBConv(kind, expansion, kernel, *shape, STOCHASTIC_DEPTH * done / count, **factory))
                done += 1
            stages.append(nn.Sequential(*blocks))
        self.backbone = nn.Sequential(
            ConvNorm(3, params.stages[0][4], 3, 2, **factory),
            *stages,
            ConvNorm(params.stages[-1][5], params.last_channel, **factory),
        )
        self.mapper = nn.Sequential(
            nn.Conv2d(params.last_channel, params.c_latent, kernel_size=1, bias=False, **factory),
            nn.BatchNorm2d(params.c_latent, **factory),
        )

    def init_weights(self) -> None:
        """Initialises the backbone as torchvision does before training."""
        for layer in self.backbone.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out")
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

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
