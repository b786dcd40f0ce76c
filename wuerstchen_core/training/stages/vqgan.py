"""Train Stage A: squared error, and the codebook loss once the latents have settled.

The original's script was never published. Würstchen's Stage B works on latents that were not quantised, so a part of
each batch goes past the codebook. Of the original's discriminator the class is known, its weight in the loss is not:
there is none here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ...common.dataclass_config import from_table
from ...models.vqgan import VQGAN, VQGANParams
from ..data.files import open_dataset
from ..rng import StepRandom
from ..sample_grid import sample_grid
from ..stage import Stage
from .networks import load_or_create


@dataclass(frozen=True)
class VQGANConfig:
    """The `[vqgan]` table."""

    crop: int = 96  # pixels
    margin: int = 24  # pixels of the picture's border that crops leave out
    quantized: float = 0.5  # share of a batch that is decoded from its codes
    quantize_from: int = 200  # steps without the codebook, which is then seeded with latents

    def __post_init__(self) -> None:
        if self.margin < 0 or self.quantize_from < 1:
            raise ValueError(
                "[vqgan] margin must be 0 or more and quantize_from 1 or more, "
                f"got {self.margin} and {self.quantize_from}"
            )
        if not 0 <= self.quantized <= 1:
            raise ValueError(f"[vqgan] quantized is a share from 0 to 1, got {self.quantized}")


class Autoencoder(nn.Module):
    """A VQGAN that takes pictures through its codes, or past them."""

    def __init__(self, vqgan: VQGAN, begun: bool):
        """`begun`: it was trained before."""
        super().__init__()
        self.vqgan = vqgan
        if not begun:  # a fixed scale leaves the latents at unit variance once divided by the scale factor
            scale = vqgan.down_blocks[-1].get_parameter("1.weight")
            scale.data.fill_(vqgan.params.scale_factor)
            scale.requires_grad_(False)

    def forward(self, images: Tensor, through_codes: int | None, seeding: bool) -> Tensor:
        """The loss of pictures [B, 3, H, W], the first `through_codes` of which go through the codebook; None: of all
        past it, and if `seeding` it starts from them."""
        latents = self.vqgan.encode(images).float()
        loss = latents.new_zeros(())
        if seeding:
            self.seed_codebook(latents.detach())
        if through_codes is not None:
            codes = self.vqgan.quantize(latents)
            loss = codes.codebook_loss + 0.25 * codes.commit_loss
            latents = torch.cat([codes.latents[:through_codes], latents[through_codes:]])
        return loss + F.mse_loss(self.vqgan.decode(latents), images)

    @torch.no_grad()
    def seed_codebook(self, latents: Tensor) -> None:
        """Start the codes from latents of a batch, spread a little: the first process's."""
        book = self.vqgan.vquantizer.codebook.weight
        rows = latents.permute(0, 2, 3, 1).flatten(0, 2)
        picked = rows[torch.randint(len(rows), (len(book),), device=rows.device)]
        book.copy_(picked + 0.05 * self.vqgan.params.scale_factor * torch.randn_like(picked))
        if dist.is_available() and dist.is_initialized():
            dist.broadcast(book, 0)


class VQGANStage(Stage[Autoencoder]):
    """Random crops of the pictures, encoded and decoded."""

    name = "vqgan"
    tables = ("start", "model", "vqgan")
    idle_weights = True  # the codebook's, until it is used
    undivided = "the codes of vqgan"

    def __init__(self, config: Mapping[str, Any]):
        self.options = from_table(VQGANConfig, config.get("vqgan", {}), "vqgan")
        self.begun = "start" in config
        self.net = Autoencoder(load_or_create(config, "vqgan", VQGAN, VQGANParams), self.begun)
        self.dataset = open_dataset(config, captions=False)
        crop, room = self.options.crop, self.dataset.side - 2 * self.options.margin
        if not 0 < crop <= room:
            raise ValueError(f"[vqgan] crop must be at most {room} pixels, which the margin leaves, got {crop}")

    def batch(self, step: int, rng: StepRandom) -> tuple[Any, ...]:
        crop, margin = self.options.crop, self.options.margin
        images = self.dataset.images(self.dataset.sample_batch(rng))
        room = torch.tensor(images.shape[-2:]) - 2 * margin - crop
        corners = margin + (rng.uniform(2) * (room + 1)).long()
        crops = [image[:, y : y + crop, x : x + crop] for image, (y, x) in zip(images, corners.tolist(), strict=True)]
        return torch.stack(crops), step + 1

    def loss(self, net: Autoencoder, *batch: Any) -> Tensor:
        images, step = batch
        quantised = self.begun or step > self.options.quantize_from
        through_codes = int(len(images) * self.options.quantized) if quantised else None
        return net(images, through_codes, seeding=not self.begun and step == self.options.quantize_from)

    def sample_grid(self, net: Autoencoder) -> Image.Image | None:
        held = self.dataset.preview_images()
        if held is None:
            return None
        truth = held.images(held.evenly_spaced(12)).to(next(net.parameters()).device)
        latents = net.vqgan.encode(truth)
        return sample_grid([truth, net.vqgan.decode(latents), net.vqgan.decode(net.vqgan.quantize(latents).latents)])

    def parts(self, net: Autoencoder) -> dict[str, nn.Module]:
        return {"vqgan": net.vqgan}
