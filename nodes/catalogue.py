"""The list of all nodes, in the order of the menu."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .image_encode import WuerstchenImageEncode
from .interpolate import WuerstchenConditioningInterpolate, WuerstchenLatentInterpolate
from .latents import WuerstchenEmptyLatents
from .loaders import (
    WuerstchenBundleLoader,
    WuerstchenCLIPLoader,
    WuerstchenModelLoader,
    WuerstchenTokenDecoderLoader,
    WuerstchenVAELoader,
)
from .lora import WuerstchenLoraLoader
from .quicklook import WuerstchenQuickLook
from .sampling import (
    WuerstchenDecoderConditioning,
    WuerstchenDecoderSample,
    WuerstchenPriorSample,
    WuerstchenSampler,
    WuerstchenScheduler,
)
from .sampling_v1 import WuerstchenTokenDecoderSample
from .text import WuerstchenTextEncode
from .vae import WuerstchenVAEDecode

NODES: list[type[io.ComfyNode]] = [
    WuerstchenBundleLoader,
    WuerstchenTextEncode,
    WuerstchenEmptyLatents,
    WuerstchenPriorSample,
    WuerstchenDecoderConditioning,
    WuerstchenDecoderSample,
    WuerstchenVAEDecode,
    WuerstchenScheduler,
    WuerstchenSampler,
    WuerstchenQuickLook,
    WuerstchenModelLoader,
    WuerstchenCLIPLoader,
    WuerstchenVAELoader,
    WuerstchenLoraLoader,
    WuerstchenImageEncode,
    WuerstchenLatentInterpolate,
    WuerstchenConditioningInterpolate,
    WuerstchenTokenDecoderLoader,
    WuerstchenTokenDecoderSample,
]


class WuerstchenExtension(ComfyExtension):
    """What ComfyUI registers."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES


async def comfy_entrypoint() -> ComfyExtension:
    """Called by ComfyUI once, at its start."""
    return WuerstchenExtension()
