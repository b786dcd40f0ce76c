"""Nodes that make latents, and the checks of the latents that nodes are given."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ..wuerstchen_core.common.geometry import LARGEST, MULTIPLE, decoder_side, nearest_legal, prior_side
from .host.latents import CHANNELS, NAMES, PIXELS, STAGE_B, STAGE_C, check_shape
from .schema import schema

logger = logging.getLogger(__name__)

TAG = "wuerstchen"


def tagged(samples: Tensor, stage: str, like: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A LATENT that says which stage it belongs to, with all else (masks) that `like` has."""
    return {**(like or {}), "samples": samples, TAG: stage}


def check_latent(latent: Mapping[str, Any], stage: str, node: str) -> Tensor:
    """The samples of a LATENT, or a ValueError that says what was connected instead of the stage's latents.

    Latents without our tag are judged by their shape, so that those of Stable Cascade's nodes pass, and by the pixels
    that the newer host's nodes for other families say one latent stands for.
    """
    samples, tag, pixels = latent["samples"], latent.get(TAG), latent.get("downscale_ratio_spacial")
    if tag is not None and tag != stage:
        raise ValueError(
            f"{node} needs {NAMES[stage]} latents, but was given {NAMES[tag]} latents: connect the {stage} output"
        )
    check_shape(samples.shape, stage, node)
    if pixels is not None and pixels != PIXELS[stage]:
        raise ValueError(
            f"{node} needs {NAMES[stage]} latents, but was given another model's of {pixels} pixels each: "
            f"connect the {stage} output of Würstchen Empty Latents"
        )
    return samples


class WuerstchenEmptyLatents(io.ComfyNode):
    """The canvas of both stages."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        legal = f"made a multiple of {MULTIPLE}, up to {LARGEST}"
        return schema(
            node_id="WuerstchenEmptyLatents",
            display_name="Würstchen Empty Latents",
            category="Würstchen/latent",
            description="Empty latents of one picture size for both stages.",
            search_aliases=["empty latent image", "size", "resolution", "width", "height", "batch"],
            inputs=[
                *(
                    io.Int.Input(
                        side,
                        default=256,
                        min=16,
                        max=16384,
                        step=8,
                        tooltip=f"{side.capitalize()} of the picture in pixels, {legal}.",
                    )
                    for side in ("width", "height")
                ),
                io.Int.Input(
                    "batch_size",
                    default=1,
                    min=1,
                    max=4096,
                    tooltip="How many pictures; picture i has the seed + i of the sampling nodes.",
                ),
            ],
            outputs=[
                io.Latent.Output("stage_c", display_name="stage_c", tooltip="For Würstchen Prior Sample."),
                io.Latent.Output("stage_b", display_name="stage_b", tooltip="For Würstchen Decoder Sample."),
            ],
        )

    @classmethod
    def execute(cls, width: int, height: int, batch_size: int) -> io.NodeOutput:
        legal = nearest_legal(width), nearest_legal(height)
        if legal != (width, height):
            logger.warning(
                f"Würstchen cannot paint {width}x{height} pixels, but {legal[0]}x{legal[1]}: "
                f"sides are multiples of {MULTIPLE} up to {LARGEST}"
            )
        c, b = ((side(legal[1]), side(legal[0])) for side in (prior_side, decoder_side))
        return io.NodeOutput(
            tagged(torch.zeros(batch_size, CHANNELS[STAGE_C], *c), STAGE_C),
            tagged(torch.zeros(batch_size, CHANNELS[STAGE_B], *b), STAGE_B),
        )
