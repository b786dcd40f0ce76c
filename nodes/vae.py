"""Nodes between latents and pictures."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from .latents import STAGE_B, check_latent
from .schema import schema


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
        return io.NodeOutput(vae.decode(samples))
