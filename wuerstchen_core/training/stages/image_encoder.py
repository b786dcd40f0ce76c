"""Trains the image encoder (semantic compressor) with a throw-away regression decoder, before Stage B exists.

The original trained it together with Stage B. Measured on the demo (one core, image error at t = 0.95 on validation
images): together 0.020 after 940 s; separately 0.013 after 1590 s of encoder and 700 s of Stage B. Separate training
was chosen because the prior, which takes longest, can then train at the same time as Stage B instead of after it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checkpoints.weight_files import read_weight_file
from ...common.dataclass_config import CountOrZero, Positive, from_table, option
from ...diffusion.schedule import expand
from ...models.image_encoder import ImageEncoder, ImageEncoderParams, semantic_view
from ...models.prior import PriorParams, latents_from_features
from ..config import START
from ..data.dataset import IndexedDataset
from ..data.files import open_dataset
from ..rng import StepRandom
from ..stage import Stage
from .losses import resize_weights, squared_error
from .networks import load_or_create
from .norms import RunningNorms, uses_running_norms


@dataclass(frozen=True)
class EncoderConfig:
    """The `[encoder]` table."""

    noise: float = option(0.3, "largest standard deviation of the noise added to the latents, whose own is 1")
    widths: tuple[int, ...] = option((256, 192, 128), "of the regression decoder, coarse to fine")
    patch: int = option(4, "side in pixels of the regression decoder's last tokens")
    feature_scale: Positive = option(PriorParams.feature_scale, "of a new encoder, equal to the prior's")
    feature_shift: float = option(
        PriorParams.feature_shift, "of a new encoder, equal to the prior's (v1: scale 1, shift 0)"
    )
    norm_steps: CountOrZero = option(
        0, "steps after which batch norms use running statistics instead of the batch's; 0: never"
    )
    backbone: str = option(
        "", "file of torchvision's EfficientNet to start from; the original's was trained on ImageNet"
    )


def regression_decoder(c_latent: int, widths: tuple[int, ...], patch: int) -> nn.Sequential:
    """Returns a network that maps latents [B, 16, h, w] to images [B, 3, H, W], doubling the sides at each width."""
    if not widths:
        raise ValueError("[encoder] widths is empty: give at least one number")
    layers: list[nn.Module] = [nn.Conv2d(c_latent, widths[0], 3, padding=1)]
    for c_in, c_out in zip(widths, (*widths[1:], 3 * patch**2), strict=True):
        layers += [
            nn.Sequential(nn.GroupNorm(8, c_in), nn.SiLU(), nn.Conv2d(c_in, c_in, 3, padding=1)),
            nn.Sequential(nn.GroupNorm(8, c_in), nn.SiLU(), nn.Conv2d(c_in, c_out, 3, padding=1)),
            nn.Upsample(scale_factor=2, mode="nearest"),
        ]
    layers[-1] = nn.PixelShuffle(patch)
    return nn.Sequential(*layers)


def load_backbone(encoder: ImageEncoder, path: Path) -> None:
    """Loads torchvision's EfficientNet weights without the classifier. ValueError if they do not fit."""
    if not path.is_file():
        raise ValueError(f"[encoder] backbone: {path} does not exist; name a file of torchvision's weights")
    weights = {
        key.removeprefix("features."): x.load()
        for state in read_weight_file(path).states.values()
        for key, x in state.items()
        if key.startswith("features.")
    }
    try:
        encoder.backbone.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(
            f"[encoder] backbone: {path} does not fit [model] stages (v2's are those of torchvision's "
            "efficientnet_v2_s, v1's of efficientnet_v2_l): name another file"
        ) from error


class Compressor(nn.Module):
    """The image encoder and its throw-away decoder."""

    def __init__(self, image_encoder: ImageEncoder, options: EncoderConfig, pretrained: bool):
        super().__init__()
        self.image_encoder = image_encoder
        self.norms = RunningNorms(image_encoder)
        self.units = PriorParams(feature_scale=options.feature_scale, feature_shift=options.feature_shift)
        norm = self.image_encoder.mapper[1].requires_grad_(False)  # else the noise would make the features grow
        if not pretrained:  # the prior's latents, (features + 1) / 42 in v2, have mean 0 and variance 1
            norm.get_parameter("weight").data.fill_(self.units.feature_scale)
            norm.get_parameter("bias").data.fill_(-self.units.feature_shift)
        self.decoder = regression_decoder(image_encoder.params.c_latent, options.widths, options.patch)

    def forward(self, images: Tensor, noise: Tensor, running_norms: bool = False) -> Tensor:
        """Returns images [B, 3, H, W] in [0, 1], encoded and decoded, with `noise` added to the latents.

        `running_norms`: the image encoder normalizes as in inference.
        """
        self.norms.use(running_norms)
        latents = latents_from_features(self.image_encoder(semantic_view(images)), self.units) + noise
        return self.decoder(latents)


class EncoderStage(Stage[Compressor]):
    """Reconstructs whole images after 42.67x compression."""

    name, part = "encoder", "image_encoder"
    tables = {"start": START, "model": ImageEncoderParams, "encoder": EncoderConfig}

    def __init__(self, config: Mapping[str, Any]):
        self.options = from_table(EncoderConfig, config.get("encoder", {}), "encoder")
        encoder = load_or_create(config, "image_encoder", ImageEncoder)
        if self.options.backbone:
            if "start" in config:
                raise ValueError("[encoder] backbone is for a new encoder: remove it, or remove start")
            load_backbone(encoder, Path(self.options.backbone))
        self.net = Compressor(encoder, self.options, pretrained="start" in config)
        self.dataset = open_dataset(config, captions=False)

    def prepare(self, picked: Any, step: int, rng: StepRandom) -> tuple[Any, ...]:
        images = self.dataset.images(picked)
        height, width = (side // 32 for side in semantic_view(images[:1]).shape[-2:])
        noise = rng.normal(self.net.image_encoder.params.c_latent, height, width)
        noise = noise * expand(rng.uniform() * self.options.noise, noise)
        running = uses_running_norms(self.options.norm_steps, step)
        return self.dataset.loss_weights(picked), images, noise, running

    def loss(self, net: Compressor, *batch: Any) -> Tensor:
        weights, images, noise, running_norms = batch
        out = net(images, noise, running_norms).float()
        target = F.interpolate(images, size=out.shape[-2:], mode="bilinear", antialias=True)
        return squared_error(out, target, resize_weights(weights, out.shape[-2:]))

    def samples(self, net: Compressor, validation: IndexedDataset) -> list[Tensor]:
        images = validation.images(validation.evenly_spaced(24)).to(next(net.parameters()).device)
        return [images, torch.cat([net(chunk, images.new_zeros(())) for chunk in images.split(12)])]
