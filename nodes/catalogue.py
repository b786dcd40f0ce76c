"""The list of all nodes, in the order of the menu."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from . import interpolate, latents, loaders, lora, quicklook, sampling, sampling_v1, text, vae

NODES: list[type[io.ComfyNode]] = [
    loaders.WuerstchenBundleLoader,
    text.WuerstchenTextEncode,
    latents.WuerstchenEmptyLatents,
    sampling.WuerstchenPriorSample,
    sampling.WuerstchenDecoderConditioning,
    sampling.WuerstchenDecoderSample,
    vae.WuerstchenVAEDecode,
    sampling.WuerstchenScheduler,
    sampling.WuerstchenSampler,
    quicklook.WuerstchenQuickLook,
    loaders.WuerstchenModelLoader,
    loaders.WuerstchenCLIPLoader,
    loaders.WuerstchenVAELoader,
    lora.WuerstchenLoraLoader,
    vae.WuerstchenImageEncode,
    interpolate.WuerstchenLatentInterpolate,
    interpolate.WuerstchenConditioningInterpolate,
    loaders.WuerstchenTokenDecoderLoader,
    sampling_v1.WuerstchenTokenDecoderSample,
    loaders.WuerstchenControlNetLoader,
]


class WuerstchenExtension(ComfyExtension):
    """Registers the nodes with ComfyUI."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES


async def comfy_entrypoint() -> ComfyExtension:
    """Returns the extension; ComfyUI calls this once, at its start."""
    return WuerstchenExtension()
