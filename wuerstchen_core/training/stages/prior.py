"""Trains Stage C: predicts noise in the frozen image encoder's features, given text."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...checkpoints.components import text_width
from ...checkpoints.open import open_source
from ...checkpoints.release import release_of_model
from ...common.dataclass_config import from_table
from ...common.geometry import nearest_legal
from ...inference.pipeline import WuerstchenPipeline
from ...inference.settings import SamplingSettings
from ...models.prior import Prior, PriorParams, latents_from_features
from ...models.text_encoder import TextEncoder
from ...models.vqgan import VQGAN
from ..config import INPUTS, START
from ..data.caption_tokens import Tokens
from .diffusion import DiffusionStage
from .losses import NoiseConfig
from .networks import encode_features, encode_text, input_source, load_frozen, load_or_create, source_exists

log = logging.getLogger(__name__)

DECODERS = {"v1": "token-decoder", "v2": "decoder"}  # the stage that trains Stage B, by release
TEXT_ENCODER = "text_encoder"  # the submodule of a prior that is trained together with its text encoder


class PriorStage(DiffusionStage[Prior]):
    """Stage C as in the original, except that the features may be cached."""

    name = part = "prior"
    tables: Mapping[str, Any] = {"start": START, "model": PriorParams, "noise": NoiseConfig}

    def __init__(self, config: Mapping[str, Any]):
        self.noise = from_table(NoiseConfig, config.get("noise", {}), "noise")
        self.net = self.build(config)
        super().__init__(config)
        to_latents = partial(latents_from_features, params=self.net.params)
        self.latents = self.dataset.map_images("features", lambda x: encode_features(self.encoder, x), to_latents)

    def build(self, config: Mapping[str, Any]) -> Prior:
        """Returns the network to train."""
        return load_or_create(config, "prior", Prior)

    def sampling(self) -> dict[str, Any]:
        width, height = map(nearest_legal, self.dataset.size)
        return {"width": width, "height": height}

    def reconstruct(
        self, net: Prior, images: Tensor, tokens: list[Tokens], sampling: SamplingSettings
    ) -> Tensor | None:
        """Generates images from the captions; None if Stage A, Stage B or its text encoder is missing."""
        stage, part = DECODERS[release_of_model([net.params])], "decoder_text_encoder"
        source = input_source(self.config, stage)
        if missing := [name for name in (stage, "vqgan") if not source_exists(input_source(self.config, name))]:
            log.info("no samples: they need %s under [inputs]", " and ".join(missing))
            return None
        decoder: Any = load_frozen(self.config, stage, nn.Module)
        if text_width(decoder.params) == self.text_encoder.params.width:
            decoder_text_encoder = self.text_encoder  # not the one that a LoRA trains
        elif part in open_source(source, headers_only=True).networks:
            decoder_text_encoder = load_frozen(self.config, stage, TextEncoder, part)
        else:
            log.info("no samples: %s has no text encoder for its decoder", source)
            return None
        device, vqgan = next(net.parameters()).device, load_frozen(self.config, "vqgan", VQGAN)
        text_encoder = getattr(net, TEXT_ENCODER, self.text_encoder)
        for network in (decoder, decoder_text_encoder, vqgan, text_encoder):
            network.to(device)
        networks: dict[str, Any] = {INPUTS[stage]: decoder}
        pipeline = WuerstchenPipeline(prior=net, vqgan=vqgan, prior_text_encoder=text_encoder, **networks)
        prior_latents = pipeline.sample_prior(torch.stack(encode_text(text_encoder, tokens)), sampling)
        text = torch.stack(encode_text(decoder_text_encoder, tokens))
        return vqgan.decode(pipeline.sample_decoder(prior_latents, text, sampling))
