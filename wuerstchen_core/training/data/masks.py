"""Masks that weight the loss of an image: which file belongs to which image, and the weights of its pixels."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from os.path import commonprefix
from typing import Annotated, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...common.dataclass_config import Fraction, OneOf, option
from .buckets import Size
from .left_out import MASK_FIRST, without_suffix

FILE, ALPHA = "file", "alpha"  # choices for masks
UNMASKED_WEIGHT = 0.1
FILE_NAME = re.compile(r"(.+?)[-_. ]\(?(?:masks?|mask[-_]?label)[-_.]?\d{0,3}\)?", re.IGNORECASE)
FOLDER_NAME = re.compile(r"masks?|mask[-_]?labels?", re.IGNORECASE)
_HINT = r"(?:control|conditioning(?:[-_]image)?|condlabel)"
HINT_FILE = re.compile(rf"(.+?)[-_. ]{_HINT}[-_.]?\d{{0,3}}", re.IGNORECASE)
HINT_FOLDER = re.compile(rf"{_HINT}s?", re.IGNORECASE)
SAME_SHAPE = 0.01  # largest relative difference of the aspect ratios of a mask and its image


class Names(NamedTuple):
    """How the files and folders of images that belong to others are named."""

    files: tuple[re.Pattern[str], ...]  # whose first group is the name of the other image
    folder: re.Pattern[str]

    def owner(self, name: str) -> str | None:
        """Returns the name of the image that a file's name contains; None if it contains none."""
        match = next(filter(None, (pattern.fullmatch(name) for pattern in self.files)), None)
        return without_suffix(match[1]) if match else None


MASK_NAMES = Names((FILE_NAME, MASK_FIRST), FOLDER_NAME)
HINT_NAMES = Names((HINT_FILE,), HINT_FOLDER)


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


def match_masks(masks: Iterable[str], images: Collection[str], names: Names = MASK_NAMES) -> dict[str, str]:
    """Returns the mask of each image that has one, by paths without their last suffix; with `HINT_NAMES`, its hint.

    `a_mask`, `a-masklabel` and `mask_a` belong to `a` in the same folder, `cats_mask/a` to `cats/a`, and `mask/a` to
    the nearest `a`, if there is one nearest. Of several masks of an image the first counts.
    """
    stems: dict[str, list[str]] = {}
    for image in images:
        stems.setdefault(image.rpartition("/")[2], []).append(image)
    found: dict[str, str] = {}
    for mask in sorted(masks):
        if name := _beside(mask, images, names) or _in_mask_folder(mask, stems, names):
            found.setdefault(name, mask)
    return found


def _beside(mask: str, images: Collection[str], names: Names) -> str | None:
    """Returns the image of a mask that its own name, or the name of a folder with masks beside the images, names."""
    parts = mask.split("/")
    for number, part in enumerate(parts):
        name = "/".join([*parts[:number], names.owner(part) or "", *parts[number + 1 :]])
        if names.owner(part) and name in images:
            return name
    return None


def _in_mask_folder(mask: str, stems: dict[str, list[str]], names: Names) -> str | None:
    """Returns the image that has the most folders in common with a mask in a folder of masks; None if several have."""
    *folders, stem = mask.split("/")
    if not any(map(names.folder.fullmatch, folders)):
        return None
    own = dict.fromkeys(filter(None, (stem, names.owner(stem), without_suffix(stem))))
    ranked = sorted((_common(folders, image.split("/")[:-1]), image) for x in own for image in stems.get(x, ()))
    if not ranked or (len(ranked) > 1 and ranked[-2][0] == ranked[-1][0]):
        return None
    return ranked[-1][1]


def _common(one: list[str], other: list[str]) -> int:
    """Returns the number of folders that two paths have in common at their start and at their end."""
    return len(commonprefix([one, other])) + len(commonprefix([one[::-1], other[::-1]]))
