"""The node that previews Stage C's latents without running Stage B."""

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
from .schema import Node, schema, title

NODE = title("WuerstchenQuickLook")


def quick_look(features: Tensor, scale: float, version: str = "v2") -> Tensor:
    """Projects Stage C latents [B, 16, h, w] of a release to blurred images [B, H, W, 3] in [0, 1].

    The colours are those of the live previews. At scale 1 the images have Stage B's size.
    """
    factors, bias = preview_factors("prior")
    if factors is None or bias is None:
        raise ValueError(f"{NODE} needs the file preview_factors.json, which is missing: install this node pack again")
    latents = latents_from_features(features.float(), with_units(PriorParams(), version)).movedim(1, -1)
    colours = (latents @ latents.new_tensor(factors) + latents.new_tensor(bias) + 1) / 2
    size = [max(1, round(side * PIXELS[STAGE_C] * scale)) for side in features.shape[-2:]]
    images = interpolate(colours.movedim(-1, 1), size, mode="bicubic", antialias=True)
    return torch.clamp(images, 0, 1).movedim(1, -1)


class WuerstchenQuickLook(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="WuerstchenQuickLook",
            category="latent",
            search_aliases=["preview", "stage c", "peek", "draft"],
            inputs=[io.Latent.Input("stage_c"), io.Float.Input("scale", default=1.0, min=0.03, max=2.0, step=0.01)],
            outputs=[io.Image.Output("image")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, stage_c: dict[str, Any], scale: float) -> io.NodeOutput:
        image = quick_look(check_latent(stage_c, STAGE_C, NODE), scale, stage_c.get(VERSION_KEY, "v2"))
        return io.NodeOutput(image, ui=ui.PreviewImage(image, cls=cls))
