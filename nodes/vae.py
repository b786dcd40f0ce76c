"""Nodes between images and latents: Stage A and the image encoder."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn.functional import interpolate

from ..wuerstchen_core.common.geometry import LARGEST, MULTIPLE
from ..wuerstchen_core.diffusion.masks import latent_mask
from ..wuerstchen_core.inference.images import legal_size, read_pixels, to_pictures, to_pixels
from .host.conditioning import VERSION_KEY
from .host.notices import notify
from .host.vae import SemanticVAE
from .latents import STAGE_B, STAGE_C, check_latent, empty_latents, tagged
from .schema import Node, schema, title

DECODE, ENCODE = title("WuerstchenVAEDecode"), title("WuerstchenImageEncode")


def check_stage_a(vae: Any, node: str) -> None:
    """Raises ValueError unless a VAE is Stage A, loaded by this pack or by ComfyUI."""
    if (getattr(vae, "latent_channels", None), getattr(vae, "upscale_ratio", None)) != (4, 4):
        raise ValueError(f"{node} got a VAE that is not Stage A: connect the vae output of a Würstchen loader")


def opaque(images: Tensor) -> Tensor:
    """Converts images [B, H, W, 1, 3 or 4] to [B, 3, H, W], with transparent pixels on white."""
    pixels = images.movedim(-1, 1)
    if pixels.shape[1] == 4:
        pixels = pixels[:, :3].lerp(torch.ones_like(pixels[:, :3]), 1 - pixels[:, 3:])
    return pixels.expand(-1, 3, -1, -1)


def fit_mask(mask: Tensor, sides: tuple[int, int], width: int, height: int) -> Tensor:
    """Scales and crops a mask [B, h, w] like its images of `sides` (height, width); returns [B, 1, height, width].

    A mask of another size is first stretched to the images' size, as ComfyUI does.
    """
    mask = mask.reshape(-1, 1, *mask.shape[-2:])
    if mask.shape[-2:] != sides:
        mask = interpolate(mask, sides, mode="bilinear")
    if sides == (height, width):
        return mask
    rows = (ImageOps.fit(one, (width, height), Image.Resampling.BILINEAR) for one in to_pictures(mask))
    return torch.cat([to_pixels(one) for one in rows])


class WuerstchenVAEDecode(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="WuerstchenVAEDecode",
            category="latent",
            search_aliases=["stage a", "vqgan", "latent to image"],
            inputs=[io.Vae.Input("vae"), io.Latent.Input("stage_b")],
            outputs=[io.Image.Output("image")],
        )

    @classmethod
    def execute(cls, vae: Any, stage_b: dict[str, Any]) -> io.NodeOutput:
        samples = check_latent(stage_b, STAGE_B, DECODE)
        check_stage_a(vae, DECODE)
        return io.NodeOutput(vae.decode(samples))


class WuerstchenImageEncode(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="WuerstchenImageEncode",
            category="latent",
            search_aliases=["vae encode", "image to image", "img2img", "inpaint", "outpaint", "image to latent"],
            inputs=[
                io.Vae.Input("image_encoder"),
                io.Image.Input("image"),
                io.Vae.Input("vae", optional=True),
                io.Mask.Input("mask", optional=True),
            ],
            outputs=[io.Latent.Output("stage_c"), io.Latent.Output("stage_b")],
        )

    @classmethod
    def execute(cls, image_encoder: Any, image: Tensor, vae: Any = None, mask: Tensor | None = None) -> io.NodeOutput:
        if not isinstance(image_encoder, SemanticVAE):
            raise ValueError(
                f"{ENCODE} got a VAE that is not Würstchen's image encoder: connect the image encoder output of a "
                "Würstchen loader"
            )
        if vae is not None:
            check_stage_a(vae, ENCODE)
        image_encoder.check_image(image)
        height, width = image.shape[1:3]
        size = legal_size(width, height)
        pixels = opaque(image)
        if size != (width, height):
            notify(
                f"Würstchen scaled and cropped an image of {width}x{height} pixels to {size[0]}x{size[1]}: "
                f"sides are multiples of {MULTIPLE} up to {LARGEST}"
            )
            pixels = torch.cat([read_pixels(picture, *size) for picture in to_pictures(pixels)])
        fitted = pixels.movedim(1, -1)
        release = {} if image_encoder.release is None else {VERSION_KEY: image_encoder.release}
        latents = [tagged(image_encoder.encode(fitted), STAGE_C, release)]
        if vae is not None:
            latents.append(tagged(vae.encode(fitted), STAGE_B))
        if mask is not None:
            if not mask.any():
                notify("The mask is empty: samplers will keep the whole image. Draw a mask, or disconnect it")
            whole = fit_mask(mask, (height, width), *size)
            for latent in latents:
                latent["noise_mask"] = latent_mask(whole, *latent["samples"].shape[-2:])
        if vae is None:
            latents.append(empty_latents(STAGE_B, *size, len(image)))
        return io.NodeOutput(*latents)
