"""Train the semantic encoder through a throw-away regression decoder, before Stage B exists.

The original trained it together with Stage B. Measured on the demo (one core, error of the picture at t = 0.95 on
held-out pictures): together 0.020 after 940 s; apart 0.013 after 1590 s of encoder and 700 s of Stage B. Apart was
chosen all the same: the prior, which takes longest, then trains on cached latents beside Stage B instead of after it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ...checkpoints.weight_files import read_weight_file
from ...common.dataclass_config import from_table
from ...diffusion.schedule import expand
from ...models.image_encoder import ImageEncoder, ImageEncoderParams, semantic_view
from ...models.prior import PriorParams, latents_from_features
from ..data.files import open_dataset
from ..rng import StepRandom
from ..sample_grid import sample_grid
from ..stage import Stage
from .networks import load_or_create


@dataclass(frozen=True)
class EncoderConfig:
    """The `[encoder]` table."""

    noise: float = 0.3  # largest standard deviation of the noise on the latents (which have 1)
    widths: tuple[int, ...] = (256, 192, 128)  # of the regression decoder, coarse to fine
    patch: int = 4  # pixels on a side that each of its last tokens becomes
    feature_scale: float = PriorParams.feature_scale  # of a new encoder, as the prior's: v1 has 1 and 0
    feature_shift: float = PriorParams.feature_shift
    backbone: str = ""  # file of torchvision's EfficientNet of these sizes, to begin with: ImageNet's, in the original

    def __post_init__(self) -> None:
        if not self.widths:
            raise ValueError("[encoder] widths must be at least one number, got none")
        if not self.feature_scale > 0:
            raise ValueError(f"[encoder] feature_scale must be more than 0, got {self.feature_scale}")


def regression_decoder(c_latent: int, widths: tuple[int, ...], patch: int) -> nn.Sequential:
    """Latents [B, 16, h, w] to pictures [B, 3, H, W]: dense convolutions, twice as fine at each width."""
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
    """Begin with torchvision's weights of an EfficientNet, whose classifier is left out. ValueError if they are of
    another, or none."""
    if not path.is_file():
        raise ValueError(f"[encoder] backbone: {path} does not exist; it is a file of torchvision's weights")
    given = {
        key.removeprefix("features."): x
        for state in read_weight_file(path).states.values()
        for key, x in state.items()
        if key.startswith("features.")
    }
    own = encoder.backbone.state_dict()
    needed = [key for key in own if not key.endswith("num_batches_tracked")]
    if given.keys() - own.keys() or any(key not in given or given[key].shape != own[key].shape for key in needed):
        raise ValueError(
            f"[encoder] backbone: {path} is of no EfficientNet of these sizes: give the file of the one that [model] "
            "stages describes (v2's is torchvision's efficientnet_v2_s, v1's efficientnet_v2_l)"
        )
    encoder.backbone.load_state_dict(given, strict=False)


class Compressor(nn.Module):
    """The encoder and its throw-away decoder."""

    def __init__(self, image_encoder: ImageEncoder, options: EncoderConfig, begun: bool):
        """`begun`: it was trained before."""
        super().__init__()
        self.image_encoder = image_encoder
        self.units = PriorParams(feature_scale=options.feature_scale, feature_shift=options.feature_shift)
        if not begun:  # fixed, so that what the prior works on, v2's (features + 1) / 42, has mean 0 and variance 1
            norm = self.image_encoder.mapper[1]
            norm.get_parameter("weight").data.fill_(self.units.feature_scale)
            norm.get_parameter("bias").data.fill_(-self.units.feature_shift)
            norm.requires_grad_(False)
        self.decoder = regression_decoder(image_encoder.params.c_latent, options.widths, options.patch)

    def forward(self, images: Tensor, noise: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in [0, 1] as they come through latents with `noise` on them."""
        latents = latents_from_features(self.image_encoder(semantic_view(images)), self.units) + noise
        return self.decoder(latents)


class EncoderStage(Stage[Compressor]):
    """Whole pictures through 42.67x compression and back."""

    name = "encoder"
    tables = ("start", "model", "encoder")

    def __init__(self, config: Mapping[str, Any]):
        self.options = from_table(EncoderConfig, config.get("encoder", {}), "encoder")
        encoder = load_or_create(config, "image_encoder", ImageEncoder, ImageEncoderParams)
        if self.options.backbone:
            if "start" in config:
                raise ValueError("[encoder] backbone is for a new encoder: leave it out, or start")
            load_backbone(encoder, Path(self.options.backbone))
        self.net = Compressor(encoder, self.options, begun="start" in config)
        self.dataset = open_dataset(config, captions=False)

    def batch(self, step: int, rng: StepRandom) -> tuple[Any, ...]:
        images = self.dataset.images(self.dataset.sample_batch(rng))
        height, width = (side // 32 for side in semantic_view(images[:1]).shape[-2:])
        noise = rng.normal(self.net.image_encoder.params.c_latent, height, width)
        return images, noise * expand(rng.uniform() * self.options.noise, noise)

    def loss(self, net: Compressor, *batch: Any) -> Tensor:
        images, noise = batch
        out = net(images, noise).float()
        target = F.interpolate(images, size=out.shape[-2:], mode="bilinear", antialias=True)
        return F.mse_loss(out, target)

    def sample_grid(self, net: Compressor) -> Image.Image | None:
        held = self.dataset.preview_images()
        if held is None:
            return None
        truth = held.images(held.evenly_spaced(24)).to(next(net.parameters()).device)
        out = torch.cat([net(part, truth.new_zeros(())) for part in truth.split(12)])
        return sample_grid([truth[:12], out[:12], truth[12:], out[12:]])

    def parts(self, net: Compressor) -> dict[str, nn.Module]:
        return {"image_encoder": net.image_encoder}
