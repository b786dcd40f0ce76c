"""The node for empty latents, and the checks of latents that other nodes use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ..wuerstchen_core.common.geometry import LARGEST, MULTIPLE, decoder_side, nearest_legal, prior_side
from .host.latents import CHANNELS, NAMES, PIXELS, STAGE_B, STAGE_C, check_shape
from .host.notices import notify
from .schema import Node, schema

TAG = "wuerstchen"  # key of a LATENT: the stage that it belongs to


def tagged(samples: Tensor, stage: str, like: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Returns a LATENT tagged with its stage; all else (masks, batch indices) comes from `like`."""
    return {**(like or {}), "samples": samples, TAG: stage}


def check_latent(latent: Mapping[str, Any], stage: str, node: str, denoise: float = 1.0) -> Tensor:
    """Returns the samples of a LATENT; ValueError unless they are latents of `stage`, with an image if denoise < 1.

    Untagged latents, such as those of Stable Cascade's nodes, are checked by their shape, and by the pixels per latent
    that newer ComfyUI versions store with empty latents.
    """
    samples, tag, pixels = latent["samples"], latent.get(TAG), latent.get("downscale_ratio_spacial")
    if tag is not None and tag != stage:
        raise ValueError(f"{node} needs {NAMES[stage]} latents, not {NAMES[tag]} latents: connect the {stage} output")
    check_shape(samples.shape, stage, node)
    if pixels is not None and pixels != PIXELS[stage]:
        raise ValueError(
            f"{node} needs {NAMES[stage]} latents, not another model's with {pixels} pixels per latent: "
            f"connect the {stage} output of Würstchen Empty Latents"
        )
    if denoise < 1 and not samples.any():
        vae = " with its vae input connected" if stage == STAGE_B else ""
        raise ValueError(
            f"{node} got empty latents and a denoise of {denoise:g}, which needs an image to start from: "
            f"set denoise to 1, or connect Würstchen Image Encode{vae}"
        )
    return samples


def empty_latents(stage: str, width: int, height: int, batch_size: int) -> dict[str, Any]:
    """Returns the empty LATENT of a stage for images of legal width and height in pixels."""
    side = prior_side if stage == STAGE_C else decoder_side
    return tagged(torch.zeros(batch_size, CHANNELS[stage], side(height), side(width)), stage)


class WuerstchenEmptyLatents(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="WuerstchenEmptyLatents",
            category="latent",
            search_aliases=["empty latent image", "size", "resolution", "width", "height", "batch"],
            inputs=[
                *(io.Int.Input(side, default=256, min=16, max=16384, step=8) for side in ("width", "height")),
                io.Int.Input("batch_size", default=1, min=1, max=4096),
            ],
            outputs=[io.Latent.Output("stage_c"), io.Latent.Output("stage_b")],
        )

    @classmethod
    def execute(cls, width: int, height: int, batch_size: int) -> io.NodeOutput:
        legal = nearest_legal(width), nearest_legal(height)
        if legal != (width, height):
            notify(
                f"Würstchen generates {legal[0]}x{legal[1]} instead of {width}x{height} pixels: "
                f"sides are multiples of {MULTIPLE} up to {LARGEST}"
            )
        return io.NodeOutput(*(empty_latents(stage, *legal, batch_size) for stage in (STAGE_C, STAGE_B)))
