"""Latent formats of both stages, and the checks that refuse other models' latents."""

from __future__ import annotations

from collections.abc import Sequence

import comfy.latent_formats
from torch import Tensor

from ...wuerstchen_core.common.geometry import LARGEST, prior_side
from ...wuerstchen_core.models.prior import PriorParams, features_from_latents, latents_from_features
from ...wuerstchen_core.models.vqgan import VQGANParams
from .notices import notify
from .previews import preview_factors

STAGE_C, STAGE_B = "stage_c", "stage_b"
NAMES = {STAGE_C: "Stage C", STAGE_B: "Stage B"}
CHANNELS = {STAGE_C: 16, STAGE_B: 4}
PIXELS = {STAGE_C: 128 / 3, STAGE_B: 4}  # image pixels per latent

EMPTY_LATENTS = "Würstchen Empty Latents"


class PriorLatents(comfy.latent_formats.LatentFormat):
    """LATENT: features in Stage B's units. Inside the prior: (features + 1) / 42 in v2, the features themselves in v1.

    Both have about unit variance inside, which the preview colours expect.
    """

    latent_channels = CHANNELS[STAGE_C]
    spacial_downscale_ratio = PIXELS[STAGE_C]

    def __init__(self, params: PriorParams | None = None) -> None:
        self.params = params or PriorParams()
        self.latent_rgb_factors, self.latent_rgb_factors_bias = preview_factors("prior")

    def process_in(self, latent: Tensor) -> Tensor:
        return latents_from_features(latent, self.params)

    def process_out(self, latent: Tensor) -> Tensor:
        return features_from_latents(latent, self.params)


class DecoderLatents(comfy.latent_formats.LatentFormat):
    """LATENT: Stage A's codebook units. Inside the decoder: about unit variance."""

    latent_channels = CHANNELS[STAGE_B]
    spacial_downscale_ratio = PIXELS[STAGE_B]
    scale_factor = 1 / VQGANParams.scale_factor

    def __init__(self) -> None:
        self.latent_rgb_factors, self.latent_rgb_factors_bias = preview_factors("decoder")


def check_shape(shape: Sequence[int], stage: str, node: str, multiple: int = 1) -> None:
    """Raises ValueError, which names `node`, unless `shape` is legal for latents of a stage.

    Other models' latents have other channels, or are finer than Stage C's and would be a huge image there.
    """
    name, channels = NAMES[stage], CHANNELS[stage]
    if len(shape) != 4 or shape[1] != channels:
        raise ValueError(
            f"{node} needs {name} latents [batch, {channels}, height, width], not another model's {list(shape)}: "
            f"connect the {stage} output of {EMPTY_LATENTS}"
        )
    height, width = shape[2:]
    if stage == STAGE_C and max(height, width) > prior_side(LARGEST):
        raise ValueError(
            f"{node} got Stage C latents of {width}x{height} (an image of {round(width * PIXELS[stage])}x"
            f"{round(height * PIXELS[stage])} pixels, {LARGEST} a side are the most), probably another model's: "
            f"connect the {stage} output of {EMPTY_LATENTS}"
        )
    if height % multiple or width % multiple:
        raise ValueError(
            f"{node} got latents of {width}x{height} (an image of {width * 4}x{height * 4} pixels), but needs sides "
            f"that are multiples of {round(multiple * PIXELS[stage])} pixels: use {EMPTY_LATENTS}, or scale the image"
        )


def warn_of_other_size(prior: Sequence[int], decoder: Sequence[int]) -> None:
    """Notifies if Stage C's latents are of an image 1.5 times as large or as small as Stage B's.

    It is legal, and usually caused by a node for empty latents that counts 8 pixels per latent.
    """
    prior_pixels = [round(side * PIXELS[STAGE_C]) for side in prior[2:]]  # height, width
    pixels = [round(side * PIXELS[STAGE_B]) for side in decoder[2:]]
    ratios = [side / other for side, other in zip(prior_pixels, pixels, strict=True)]
    if max(ratios) > 1.5 or min(ratios) < 1 / 1.5:
        notify(
            f"Würstchen's Stage B generates {pixels[1]}x{pixels[0]} pixels from Stage C latents of about "
            f"{prior_pixels[1]}x{prior_pixels[0]}: use one {EMPTY_LATENTS} for both stages, unless this is intended"
        )
