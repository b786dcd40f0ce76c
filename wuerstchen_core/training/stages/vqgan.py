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

from ...common.dataclass_config import Count, CountOrZero, Fraction, NotNegative, from_table, option
from ...diffusion.schedule import expand
from ...models.vqgan import VQGAN, VQGANParams
from ..config import START
from ..data.dataset import IndexedDataset
from ..data.files import open_dataset
from ..rng import StepRandom
from ..stage import Stage
from .losses import absolute_error, resize_weights, squared_error
from .networks import load_or_create
from .norms import RunningNorms, uses_running_norms


@dataclass(frozen=True)
class VQGANConfig:
    """The `[vqgan]` table."""

    crop: int = option(96, "side of the random crops in pixels")
    margin: CountOrZero = option(24, "pixels at the border that crops avoid")
    quantized: Fraction = option(0.5, "fraction of a batch that is decoded from codes")
    quantize_from: Count = option(200, "steps without the codebook, which is then initialised with latents")
    norm_steps: CountOrZero = option(
        0, "steps after which latents are normalized by running statistics instead of the batch's; 0: never"
    )
    commit: NotNegative = option(0.25, "weight of the commitment loss, which draws latents to their codes")
    noise: NotNegative = option(
        0.0, "largest standard deviation of the noise added to latents that are not quantized, whose own is 1"
    )
    absolute: NotNegative = option(0.0, "weight of the pixels' absolute errors, beside 1 of their squared errors")


class Autoencoder(nn.Module):
    """Encodes and decodes images, with or without quantizing."""

    def __init__(self, vqgan: VQGAN, pretrained: bool, options: VQGANConfig | None = None):
        super().__init__()
        options = options or VQGANConfig()
        self.vqgan, self.commit, self.absolute = vqgan, options.commit, options.absolute
        self.norms = RunningNorms(vqgan)
        scale = vqgan.down_blocks[-1].get_parameter("1.weight").requires_grad_(False)  # else noise would make it grow
        if not pretrained:  # latents of unit variance once they are divided by the scale factor
            scale.data.fill_(vqgan.params.scale_factor)

    def forward(
        self,
        images: Tensor,
        quantized: int | None,
        init_codebook: bool,
        weights: Tensor | None = None,
        noise: Tensor | None = None,
        running_norm: bool = False,
    ) -> Tensor:
        """Returns the loss of images [B, 3, H, W], of which `quantized` are decoded from codes (None: no codebook).

        `weights` [B, 1, H, W] are factors of the pixels' losses. `noise` [B, 4, H/4, W/4], in units of the latents'
        standard deviation, is added to the latents of the other images. `running_norm`: latents are normalized as in
        inference.
        """
        self.norms.use(running_norm)
        latents = self.vqgan.encode(images).float()
        loss = latents.new_zeros(())
        if init_codebook:
            self.init_codebook(latents.detach())
        if quantized is not None:
            codes = self.vqgan.quantize(latents, resize_weights(weights, latents.shape[-2:]))
            loss = codes.codebook_loss + self.commit * codes.commit_loss
        count = quantized or 0
        others = latents[count:]
        if noise is not None:
            others = others + self.vqgan.params.scale_factor * noise[count:]
        latents = others if quantized is None else torch.cat([codes.latents[:count], others])
        decoded = self.vqgan.decode(latents)
        loss = loss + squared_error(decoded, images, weights)
        return loss + self.absolute * absolute_error(decoded, images, weights) if self.absolute else loss

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
        self.net = Autoencoder(load_or_create(config, "vqgan", VQGAN), self.pretrained, self.options)
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
        return weights, _crop(images, corners, crop), step + 1, self._noise(rng)

    def _noise(self, rng: StepRandom) -> Tensor | None:
        """Returns noise [B, 4, crop / 4, crop / 4] of a random strength for each image; None if there is none."""
        if not self.options.noise:
            return None
        params = self.net.vqgan.params
        side = self.options.crop // 2**params.levels
        noise = rng.normal(params.c_latent, side, side)
        return noise * expand(rng.uniform() * self.options.noise, noise)

    def loss(self, net: Autoencoder, *batch: Any) -> Tensor:
        weights, images, step, noise = batch
        start, running = self.options.quantize_from, uses_running_norms(self.options.norm_steps, step - 1)
        quantized = int(len(images) * self.options.quantized) if self.pretrained or step > start else None
        init_codebook = not self.pretrained and step == start
        return net(images, quantized, init_codebook, weights, noise, running_norm=running)

    def samples(self, net: Autoencoder, validation: IndexedDataset) -> list[Tensor]:
        """Returns images, and their reconstructions without and with quantizing."""
        images = validation.images(validation.evenly_spaced(12)).to(next(net.parameters()).device)
        latents = net.vqgan.encode(images)
        return [images, net.vqgan.decode(latents), net.vqgan.decode(net.vqgan.quantize(latents).latents)]
