"""The `[sample]` table: images of one's own prompts at some steps of a training, beside those of the base model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from PIL import Image

from ..common.dataclass_config import CountOrZero, NotNegative, OneOf, option
from ..diffusion.samplers import LARGEST_SEED
from ..diffusion.schedule import SCHEDULES
from ..inference.pipeline import WuerstchenPipeline
from ..inference.settings import SamplingSettings

SETTINGS = ("width", "height", "schedule", "prior_steps", "prior_guidance", "decoder_steps", "decoder_guidance")


@dataclass(frozen=True)
class SampleConfig:
    """The `[sample]` table."""

    prompts: tuple[str, ...] = option((), "texts to generate images of while training; none: no sample grids of them")
    seeds: tuple[int, ...] = option((0,), "each prompt has an image of each seed")
    negative: str = option("", "negative prompt")
    every: CountOrZero = option(0, "steps from one grid to the next, from step 0 on; 0: [train] sheet_every")
    width: CountOrZero = option(0, "pixels; 0: those of the training images that are nearest to squares")
    height: CountOrZero = option(0, "pixels; 0: those of the training images that are nearest to squares")
    schedule: Annotated[str, OneOf(("", *SCHEDULES))] = option("", "times of Stage C; empty: the model's own")
    prior_steps: CountOrZero = option(0, "steps of Stage C; 0: the model's own")
    prior_guidance: NotNegative = option(0.0, "guidance scale of Stage C, 1 for none; 0: the model's own")
    decoder_steps: CountOrZero = option(0, "steps of Stage B; 0: the model's own")
    decoder_guidance: NotNegative = option(0.0, "guidance scale of Stage B, 1 for none; 0: the model's own")

    def __post_init__(self) -> None:
        if not self.seeds or not all(0 <= seed < LARGEST_SEED for seed in self.seeds):
            raise ValueError(f"[sample] seeds must be one or more numbers from 0 to {LARGEST_SEED - 1}")


def generate_samples(
    pipeline: WuerstchenPipeline, config: SampleConfig, metadata: Mapping[str, Any], size: tuple[int, int]
) -> list[Image.Image]:
    """Returns an image of each prompt and seed. `metadata` are the model's, `size` is the default size in pixels."""
    sampling = SamplingSettings.from_metadata(metadata, pipeline.version).updated(width=size[0], height=size[1])
    pipeline.sampling = sampling.updated(**{name: getattr(config, name) or None for name in SETTINGS})
    pipeline.progress = False
    images: list[Image.Image] = []
    for prompt in config.prompts:  # one at a time, since training needs the memory
        seeds = list(config.seeds)
        images += pipeline.generate(prompt, negative=config.negative, seed=seeds, count=len(seeds))
    return images
