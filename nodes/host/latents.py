"""Latents of both stages: their units inside and outside the samplers, and which of them are another model's."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import comfy.latent_formats
from torch import Tensor

from ...wuerstchen_core.common.geometry import LARGEST, prior_side
from ...wuerstchen_core.models.prior import PriorParams, features_from_latents, latents_from_features
from ...wuerstchen_core.models.vqgan import VQGANParams
from .previews import preview_factors

logger = logging.getLogger(__name__)

STAGE_C, STAGE_B = "stage_c", "stage_b"
NAMES = {STAGE_C: "Stage C", STAGE_B: "Stage B"}
CHANNELS = {STAGE_C: 16, STAGE_B: 4}
PIXELS = {STAGE_C: 128 / 3, STAGE_B: 4}  # of the picture, for each latent

_USE = "Würstchen Empty Latents"


class PriorLatents(comfy.latent_formats.LatentFormat):
    """Features as Stage B takes them outside; inside the prior v2's (features + 1) / 42, or v1's features themselves.

    Either has about the variance of the noise inside, which is what the colours of the previews are for.
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
    """Stage A's codebook units outside, about unit variance inside the decoder."""

    latent_channels = CHANNELS[STAGE_B]
    spacial_downscale_ratio = PIXELS[STAGE_B]
    scale_factor = 1 / VQGANParams.scale_factor

    def __init__(self) -> None:
        self.latent_rgb_factors, self.latent_rgb_factors_bias = preview_factors("decoder")


def check_shape(shape: Sequence[int], stage: str, who: str, multiple: int = 1) -> None:
    """Raise ValueError, in the name of `who`, unless a stage can have latents of this shape.

    Another family's have other channels, or, since nearly all are finer than Stage C's, would be a huge picture there.
    """
    name, channels = NAMES[stage], CHANNELS[stage]
    if len(shape) != 4 or shape[1] != channels:
        raise ValueError(
            f"{who} needs {name} latents [batch, {channels}, height, width], but was given {list(shape)}, "
            f"another model's: connect the {stage} output of {_USE}"
        )
    height, width = shape[2:]
    if stage == STAGE_C and max(height, width) > prior_side(LARGEST):
        raise ValueError(
            f"{who} was given latents of {width}x{height}, for Stage C a picture of {round(width * PIXELS[stage])}x"
            f"{round(height * PIXELS[stage])} pixels, so probably another model's: connect the {stage} output of "
            f"{_USE}, of at most {LARGEST} pixels a side"
        )
    if height % multiple or width % multiple:
        pixels = round(multiple * PIXELS[stage])
        raise ValueError(
            f"{who} cannot paint latents of {width}x{height}, a picture of {width * 4}x{height * 4} pixels: sides must "
            f"be multiples of {pixels} pixels, as {_USE} makes them; scale a picture so before you encode it"
        )


def warn_of_other_size(prior: Sequence[int], decoder: Sequence[int]) -> None:
    """Say in the log where Stage C's latents are of a picture much larger or smaller than Stage B's.

    It is allowed, and mostly the work of a node for empty latents that counts 8 pixels a latent.
    """
    planned = [round(side * PIXELS[STAGE_C]) for side in prior[2:]]  # height, width
    painted = [round(side * PIXELS[STAGE_B]) for side in decoder[2:]]
    ratios = [side / other for side, other in zip(planned, painted, strict=True)]
    if max(ratios) > 1.5 or min(ratios) < 1 / 1.5:
        logger.warning(
            f"Würstchen's Stage B paints {painted[1]}x{painted[0]} pixels of what Stage C planned for about "
            f"{planned[1]}x{planned[0]}: take both stages' latents from one {_USE}, unless you mean it"
        )
