"""The node from pictures to latents."""

from __future__ import annotations

import logging
from typing import Any

import torch
from comfy_api.latest import io
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn.functional import interpolate

from ..wuerstchen_core.common.geometry import LARGEST, MULTIPLE, decoder_side
from ..wuerstchen_core.diffusion.masks import latent_mask
from ..wuerstchen_core.inference.images import legal_size, read_pixels, to_pictures, to_pixels
from .host.conditioning import VERSION_KEY
from .host.vae import SemanticVAE
from .latents import CHANNELS, STAGE_B, STAGE_C, tagged
from .schema import schema
from .vae import check_stage_a

logger = logging.getLogger(__name__)

NODE = "Würstchen Image Encode"


def opaque(images: Tensor) -> Tensor:
    """Pictures [B, H, W, 1, 3 or 4] as [B, 3, H, W]: transparency on white."""
    pixels = images.movedim(-1, 1)
    if pixels.shape[1] == 4:
        pixels = pixels[:, :3].lerp(torch.ones_like(pixels[:, :3]), 1 - pixels[:, 3:])
    return pixels.expand(-1, 3, -1, -1)


def fit_mask(mask: Tensor, sides: tuple[int, int], width: int, height: int) -> Tensor:
    """A mask [B, h, w] of pictures with `sides` (height, width), scaled and cropped as these are: [B, 1, H, W].

    One of another size than the pictures is first stretched to theirs, as the host does.
    """
    mask = mask.reshape(-1, 1, *mask.shape[-2:])
    if mask.shape[-2:] != sides:
        mask = interpolate(mask, sides, mode="bilinear")
    if sides == (height, width):
        return mask
    rows = (ImageOps.fit(one, (width, height), Image.Resampling.BILINEAR) for one in to_pictures(mask))
    return torch.cat([to_pixels(one) for one in rows])


class WuerstchenImageEncode(io.ComfyNode):
    """Pictures to the latents of both stages."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="WuerstchenImageEncode",
            display_name=NODE,
            category="Würstchen/latent",
            description="Turns pictures into latents of both stages: to reconstruct, vary, mix or paint over them.",
            search_aliases=["vae encode", "image to image", "img2img", "inpaint", "outpaint", "image to latent"],
            inputs=[
                io.Vae.Input("image_encoder", tooltip="The image encoder output of a Würstchen loader."),
                io.Image.Input(
                    "image",
                    tooltip=f"Pictures of any size: their sides become the nearest multiples of {MULTIPLE}, up to "
                    f"{LARGEST}; a picture is scaled to cover that and cropped around its centre. Transparency "
                    "becomes white.",
                ),
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip="Stage A: the vae output of a Würstchen loader. With it stage_b holds the picture too; "
                    "without, stage_b is empty and of the right size.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="What is to be painted anew. Stage C paints every cell of 42.67 pixels that it touches; "
                    "stage_b is masked only where vae is connected.",
                ),
            ],
            outputs=[
                io.Latent.Output("stage_c", display_name="stage_c", tooltip="What the pictures show, for Stage C."),
                io.Latent.Output("stage_b", display_name="stage_b", tooltip="For Würstchen Decoder Sample."),
            ],
        )

    @classmethod
    def execute(cls, image_encoder: Any, image: Tensor, vae: Any = None, mask: Tensor | None = None) -> io.NodeOutput:
        if not isinstance(image_encoder, SemanticVAE):
            raise ValueError(
                f"{NODE} was given a VAE that is not Würstchen's image encoder: connect the image encoder output of a "
                "Würstchen loader"
            )
        if vae is not None:
            check_stage_a(vae, NODE)
        height, width = image.shape[1:3]
        size = legal_size(width, height)
        pixels = opaque(image)
        if size != (width, height):
            logger.warning(
                f"Würstchen scaled and cropped a picture of {width}x{height} pixels to {size[0]}x{size[1]}: "
                f"sides are multiples of {MULTIPLE} up to {LARGEST}"
            )
            pixels = torch.cat([read_pixels(picture, *size) for picture in to_pictures(pixels)])
        fitted = pixels.movedim(1, -1)
        release = {} if image_encoder.release is None else {VERSION_KEY: image_encoder.release}
        stage_c = tagged(image_encoder.encode(fitted), STAGE_C, release)
        if vae is None:
            b = (decoder_side(size[1]), decoder_side(size[0]))
            stage_b = tagged(torch.zeros(len(image), CHANNELS[STAGE_B], *b), STAGE_B)
        else:
            stage_b = tagged(vae.encode(fitted), STAGE_B)
        if mask is not None:
            whole = fit_mask(mask, (height, width), *size)
            for latent in (stage_c, stage_b) if vae is not None else (stage_c,):
                latent["noise_mask"] = latent_mask(whole, *latent["samples"].shape[-2:])
        return io.NodeOutput(stage_c, stage_b)
