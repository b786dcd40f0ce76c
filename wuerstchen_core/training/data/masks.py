"""Masks that weight the loss of an image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...common.dataclass_config import Fraction, OneOf, option
from .buckets import Size

FILE, ALPHA = "file", "alpha"  # choices for masks
UNMASKED_WEIGHT = 0.1
SAME_SHAPE = 0.01  # largest relative difference of the aspect ratios of a mask and its image


@dataclass(frozen=True, kw_only=True)
class MaskConfig:
    """How masks weight the loss: white counts 1, black counts `unmasked_weight`.

    Divided by their mean over the image, as by default, the weights are those of a mean over the masked part, and every
    image counts the same; else images with small masks count little. Images without a mask have the weight 1.
    """

    mask: Annotated[str, OneOf(("", FILE, ALPHA))] = option(
        "", "weight the loss by a mask: file, beside the picture, or alpha, its opacity; empty: no masks"
    )
    unmasked_weight: Fraction = option(
        UNMASKED_WEIGHT, "weight of what is black in the mask file, or transparent; what is white or opaque has 1"
    )
    normalize_masks: bool = option(
        True, "divide the weights of a picture by their mean; false: pictures with small masks count less"
    )

    def __post_init__(self) -> None:
        if not self.mask and (self.unmasked_weight != UNMASKED_WEIGHT or not self.normalize_masks):
            raise ValueError('[data] unmasked_weight and normalize_masks need masks: set mask = "file" or "alpha"')

    def pixel_weights(self, mask: Image.Image | None, size: Size, name: str) -> Tensor:
        """Returns the loss weights [H, W] of an image called `name`, from its cropped grey mask of a size.

        ValueError if all are 0.
        """
        if mask is None:
            return torch.ones(size[::-1])
        white = torch.from_numpy(np.array(mask, dtype=np.float32)) / 255
        weights = white + self.unmasked_weight * (1 - white)
        if not weights.any():
            raise ValueError(f"the mask of {name} is black, and unmasked_weight is 0: correct the mask, or remove both")
        return weights / weights.mean() if self.normalize_masks else weights


def check_shape(mask: Size, image: Size, name: str, kind: str = "mask") -> None:
    """Raises ValueError if a mask, or another `kind`, has another aspect ratio than the image called `name`."""
    if abs(mask[0] * image[1] / (mask[1] * image[0]) - 1) > SAME_SHAPE:
        mask_size, size = (f"{width}x{height}" for width, height in (mask, image))
        raise ValueError(f"the {kind} of {name} has {mask_size} pixels, the picture {size}: give it the same shape")
