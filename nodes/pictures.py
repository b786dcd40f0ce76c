"""Nodes between latents and pictures."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from .latents import STAGE_B, check_latent
from .schema import schema

STRIP = 128  # rows of latents that are decoded at once
HALO = 16  # rows around them that they depend on: 12 blocks of radius 1, the upsampling, and a finer block


def decode_in_strips(vae: Any, latents: Tensor) -> Tensor:
    """Latents [B, 4, h, w] to pictures [B, 4h, 4w, 3]: what `vae.decode` gives, in memory that height does not raise.

    Stage A normalises over channels only, so that a strip with its halo lacks nothing.
    """
    height = latents.shape[2]
    if height <= STRIP + HALO:
        return vae.decode(latents)
    strips = []
    for top in range(0, height, STRIP):
        bottom, start = min(top + STRIP, height), max(top - HALO, 0)
        picture = vae.decode(latents[:, :, start : bottom + HALO])
        strips.append(picture[:, (top - start) * 4 : (bottom - start) * 4])
    return torch.cat(strips, dim=1)


def check_stage_a(vae: Any, node: str) -> None:
    """Raise ValueError unless a VAE is Stage A, by whichever loader."""
    if (vae.latent_channels, vae.upscale_ratio) != (4, 4):
        raise ValueError(f"{node} was given a VAE that is not Stage A: connect the loader's vae output")


class WuerstchenVAEDecode(io.ComfyNode):
    """Stage A."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="WuerstchenVAEDecode",
            display_name="Würstchen VAE Decode",
            category="Würstchen/latent",
            description="Stage A: turns Stage B's latents into a picture.",
            search_aliases=["stage a", "vqgan", "latent to image"],
            inputs=[
                io.Vae.Input("vae", tooltip="Stage A: the vae output of a Würstchen loader."),
                io.Latent.Input("stage_b", tooltip="The latents that Würstchen Decoder Sample painted."),
            ],
            outputs=[io.Image.Output("image", display_name="image", tooltip="The picture.")],
        )

    @classmethod
    def execute(cls, vae: Any, stage_b: dict[str, Any]) -> io.NodeOutput:
        node = "Würstchen VAE Decode"
        samples = check_latent(stage_b, STAGE_B, node)
        check_stage_a(vae, node)
        return io.NodeOutput(decode_in_strips(vae, samples))
