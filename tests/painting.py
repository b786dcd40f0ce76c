"""What tests of the pipeline share: a prompt, and pictures and latents as numbers."""

from __future__ import annotations

import numpy as np
from PIL import Image
from torch import Tensor

from wuerstchen_core import WuerstchenPipeline

PROMPT = "a red apple"
ROUNDING = 1  # of 255: where in memory a tensor lies, and how many share a batch, moves fp32 in its last digit


def pixels(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image).astype(int) for image in images])


def latents(pipe: WuerstchenPipeline, prompts: list[str], seed: int) -> tuple[Tensor, Tensor]:
    """What Stages C and B make of prompts."""
    prior_text, decoder_text = pipe.encode_text(prompts)
    features = pipe.sample_prior(prior_text, pipe.sampling, seed=seed)
    return features, pipe.sample_decoder(features, decoder_text, pipe.sampling, seed=seed)
