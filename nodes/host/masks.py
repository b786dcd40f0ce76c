"""Masks of the image on the coarser grids of the stages."""

from __future__ import annotations

from collections.abc import Sequence
from functools import wraps
from typing import Any

import comfy.samplers
from torch import Tensor

from ...wuerstchen_core.diffusion.masks import latent_mask


def grid_mask(mask: Tensor, sides: Sequence[int]) -> Tensor:
    """Returns a mask [..., H, W] as [B, 1, height, width] for latents of `sides` (height, width)."""
    return latent_mask(mask.reshape(-1, 1, *mask.shape[-2:]), *sides)


def widen_masks(model: type) -> None:
    """Makes ComfyUI's samplers fit the masks of latents to the grid of a `model` of this class.

    ComfyUI interpolates between single pixels, so that a mask thinner than a cell would do nothing. It does so before
    it calls a MODEL's wrappers, hence this wrapper of its guider.
    """
    sample = comfy.samplers.CFGGuider.sample

    @wraps(sample)
    def sample_with_mask(
        guider: Any,
        noise: Tensor,
        latent_image: Tensor,
        sampler: Any,
        sigmas: Tensor,
        denoise_mask: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        if isinstance(denoise_mask, Tensor) and isinstance(guider.model_patcher.model, model):
            denoise_mask = grid_mask(denoise_mask, latent_image.shape[-2:])
        return sample(guider, noise, latent_image, sampler, sigmas, denoise_mask, *args, **kwargs)

    comfy.samplers.CFGGuider.sample = sample_with_mask
