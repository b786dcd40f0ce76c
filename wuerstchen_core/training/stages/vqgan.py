"""Trains Stage A: squared error, and the codebook loss once the latents have settled.

The original's script was never published. Würstchen's Stage B works on latents that are not quantized, so part of each
batch bypasses the codebook. Of the original's discriminator only the class is known, not its weight in the loss: it is
left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...common.dataclass_config import Count, CountOrZero, Fraction, from_table, option
from ...models.vqgan import VQGAN, VQGANParams
from ..config import START
from ..data.dataset import InMemoryDataset
from ..data.files import open_dataset
from ..rng import StepRandom
from ..stage import Stage
from .losses import resize_weights, squared_error
from .networks import load_or_create


@dataclass(frozen=True)
class VQGANConfig:
    """The `[vqgan]` table."""

    crop: int = option(96, "side of the random crops in pixels")
    margin: CountOrZero = option(24, "pixels at the border that crops avoid")
    quantized: Fraction = option(0.5, "fraction of a batch that is decoded from codes")
    quantize_from: Count = option(200, "steps without the codebook, which is then initialised with latents")


class Autoencoder(nn.Module):
    """Encodes and decodes images, with or without quantizing."""

    def __init__(self, vqgan: VQGAN, pretrained: bool):
        super().__init__()
        self.vqgan = vqgan
        if not pretrained:  # a fixed norm gives the latents unit variance once they are divided by the scale factor
            scale = vqgan.down_blocks[-1].get_parameter("1.weight")
            scale.data.fill_(vqgan.params.scale_factor)
            scale.requires_grad_(False)

    def forward(
        self, images: Tensor, quantized: int | None, init_codebook: bool, weights: Tensor | None = None
    ) -> Tensor:
        """Returns the loss of images [B, 3, H, W], of which `quantized` are decoded from codes (None: no codebook).

        `weights` [B, 1, H, W] are factors of the pixels' losses.
        """
        latents = self.vqgan.encode(images).float()
        loss = latents.new_zeros(())
        if init_codebook:
            self.init_codebook(latents.detach())
        if quantized is not None:
            codes = self.vqgan.quantize(latents, resize_weights(weights, latents.shape[-2:]))
            loss = codes.codebook_loss + 0.25 * codes.commit_loss
            latents = torch.cat([codes.latents[:quantized], latents[quantized:]])
        return loss + squared_error(self.vqgan.decode(latents), images, weights)

    @torch.no_grad()
    def init_codebook(self, latents: Tensor) -> None:
        """Sets the codes to random latents of the first process, with a little noise."""
        codebook = self.vqgan.vquantizer.codebook.weight
        rows = latents.permute(0, 2, 3, 1).flatten(0, 2)
        picked = rows[torch.randint(len(rows), (len(codebook),), device=rows.device)]
        codebook.copy_(picked + 0.05 * self.vqgan.params.scale_factor * torch.randn_like(picked))
        if dist.is_available() and dist.is_initialized():
            dist.broadcast(codebook, 0)


def _crop(images: Tensor, corners: Tensor, side: int) -> Tensor:
    """Returns squares [B, c, side, side] of images at corners [B, 2] (y, x)."""
    found = [
        x[:, top : top + side, left : left + side] for x, (top, left) in zip(images, corners.tolist(), strict=True)
    ]
    return torch.stack(found)


class VQGANStage(Stage[Autoencoder]):
    """Reconstructs random crops."""

    name = part = "vqgan"
    tables = {"start": START, "model": VQGANParams, "vqgan": VQGANConfig}
    unused_weights = True  # the codebook, until it is used
    fsdp_conflict = "the codebook of vqgan"

    def __init__(self, config: Mapping[str, Any]):
        self.options = from_table(VQGANConfig, config.get("vqgan", {}), "vqgan")
        self.pretrained = "start" in config
        self.net = Autoencoder(load_or_create(config, "vqgan", VQGAN), self.pretrained)
        self.dataset = open_dataset(config, captions=False)
        crop, largest = self.options.crop, self.dataset.side - 2 * self.options.margin
        if not 0 < crop <= largest:
            raise ValueError(f"[vqgan] crop must be from 1 to {largest} pixels, which the margin leaves, got {crop}")

    def prepare(self, picked: Any, step: int, rng: StepRandom) -> tuple[Any, ...]:
        crop, margin = self.options.crop, self.options.margin
        images = self.dataset.images(picked)
        room = torch.tensor(images.shape[-2:]) - 2 * margin - crop
        corners = margin + (rng.uniform(2) * (room + 1)).long()
        weights = self.dataset.loss_weights(picked)
        if weights is not None:
            weights = _crop(weights.expand(-1, -1, *images.shape[-2:]), corners, crop)
        return weights, _crop(images, corners, crop), step + 1

    def loss(self, net: Autoencoder, *batch: Any) -> Tensor:
        weights, images, step = batch
        start = self.options.quantize_from
        quantized = int(len(images) * self.options.quantized) if self.pretrained or step > start else None
        return net(images, quantized, init_codebook=not self.pretrained and step == start, weights=weights)

    def samples(self, net: Autoencoder, validation: InMemoryDataset) -> list[Tensor]:
        """Returns images, and their reconstructions without and with quantizing."""
        images = validation.images(validation.evenly_spaced(12)).to(next(net.parameters()).device)
        latents = net.vqgan.encode(images)
        return [images, net.vqgan.decode(latents), net.vqgan.decode(net.vqgan.quantize(latents).latents)]
