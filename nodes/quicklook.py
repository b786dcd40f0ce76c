"""What the prior decided, before Stage B is paid for."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io, ui
from torch import Tensor
from torch.nn.functional import interpolate

from ..wuerstchen_core.checkpoints.release import with_units
from ..wuerstchen_core.models.prior import PriorParams, latents_from_features
from .host.conditioning import VERSION_KEY
from .host.latents import PIXELS
from .host.previews import preview_factors
from .latents import STAGE_C, check_latent
from .schema import schema


def quick_look(features: Tensor, scale: float, version: str = "v2") -> Tensor:
    """Stage C latents [B, 16, h, w] to blurred pictures [B, H, W, 3] from 0 to 1, by the live previews' colours.

    `version` says in whose units the features are.
    """
    factors, bias = preview_factors("prior")
    if factors is None or bias is None:
        raise ValueError("Würstchen Quick Look has no preview_factors.json: install these nodes again")
    latents = latents_from_features(features.float(), with_units(PriorParams(), version)).movedim(1, -1)
    colours = (latents @ latents.new_tensor(factors) + latents.new_tensor(bias) + 1) / 2
    size = [max(1, round(side * PIXELS[STAGE_C] * scale)) for side in features.shape[-2:]]
    picture = interpolate(colours.movedim(-1, 1), size, mode="bicubic", antialias=True)
    return torch.clamp(picture, 0, 1).movedim(1, -1)


class WuerstchenQuickLook(io.ComfyNode):
    """Stage C as a picture."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="WuerstchenQuickLook",
            display_name="Würstchen Quick Look",
            category="Würstchen/latent",
            description="Shows at once, blurred, what Stage C decided, before Stage B paints it.",
            search_aliases=["preview", "stage c", "peek", "draft"],
            inputs=[
                io.Latent.Input("stage_c", tooltip="The latents that Würstchen Prior Sample painted."),
                io.Float.Input(
                    "scale",
                    default=1.0,
                    min=0.03,
                    max=2.0,
                    step=0.01,
                    tooltip="Size of the quick look: 1 is about the size of the picture that Stage B will paint.",
                ),
            ],
            outputs=[io.Image.Output("image", display_name="image", tooltip="The blurred picture, also on the node.")],
            is_output_node=True,  # it shows itself, with nothing connected behind it
        )

    @classmethod
    def execute(cls, stage_c: dict[str, Any], scale: float) -> io.NodeOutput:
        features = check_latent(stage_c, STAGE_C, "Würstchen Quick Look")
        image = quick_look(features, scale, stage_c.get(VERSION_KEY, "v2"))
        return io.NodeOutput(image, ui=ui.PreviewImage(image, cls=cls))
