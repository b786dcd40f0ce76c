"""Trains Stage C: predicts noise in the frozen image encoder's features, given text."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...checkpoints import build_part
from ...checkpoints.components import TOWERS, text_width
from ...checkpoints.open import open_part, open_source
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
from ..reconstruction import STAGE_A, STAGE_B
from ..samples import SampleConfig
from .diffusion import TEXT_ENCODER, DiffusionStage
from .losses import NoiseConfig
from .networks import encode_features, encode_text, input_source, load_frozen, load_or_create, read_input, source_exists

DECODERS = {"v1": "token-decoder", "v2": "decoder"}  # the stage that trains Stage B, by release


class PriorStage(DiffusionStage[Prior]):
    """Stage C as in the original, except that the features may be cached."""

    name = part = network = "prior"
    tables: Mapping[str, Any] = {
        "start": START, "model": PriorParams, "noise": NoiseConfig, "sample": SampleConfig,
    }  # fmt: skip

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

    def missing_for_samples(self) -> str:
        stage = self.decoder_stage
        if missing := [name for name in (stage, "vqgan") if not source_exists(input_source(self.config, name))]:
            return f"{' and '.join(missing)} under [inputs]"
        source, text = input_source(self.config, stage), read_input(self.config, "text", self.text_part)
        if text_width(read_input(self.config, stage).params) != text.params.width:
            if TOWERS[1] not in open_source(source, headers_only=True).networks:
                return f"the text encoder of the {stage}, which {source} lacks"
        return ""

    def pipeline(self, net: Prior) -> WuerstchenPipeline:
        stage, device = self.decoder_stage, next(net.parameters()).device
        decoder: Any = load_frozen(self.config, stage, nn.Module)
        if text_width(decoder.params) == self.text_encoder.params.width:
            decoder_text_encoder = self.text_encoder  # not the one that a LoRA trains
        else:
            decoder_text_encoder = load_frozen(self.config, stage, TextEncoder, TOWERS[1])
        networks: dict[str, Any] = {
            INPUTS[stage]: decoder,
            TOWERS[0]: getattr(net, TEXT_ENCODER, self.text_encoder),
            TOWERS[1]: decoder_text_encoder,
            "vqgan": load_frozen(self.config, "vqgan", VQGAN),
        }
        return WuerstchenPipeline(prior=net, **{name: network.to(device) for name, network in networks.items()})

    def use_weights(self, pipeline: WuerstchenPipeline, path: Path) -> None:
        network = build_part(open_part(path, self.part), dtype=torch.float32)
        assert isinstance(network, Prior)
        pipeline.prior = network.to(pipeline.device)

    def reconstructions(self, net: Prior, images: Tensor) -> dict[str, Tensor]:
        if self.missing_for_samples():
            return {}
        pipeline = self.pipeline(net)
        vqgan, tower = pipeline.require("vqgan"), pipeline.require(TOWERS[1])
        images = images.to(pipeline.device)
        height, width = images.shape[-2:]
        text = torch.stack(encode_text(tower, self.dataset.tokenizer.uncounted([""] * len(images))))
        features = encode_features(self.encoder.to(pipeline.device), images)
        latents = pipeline.sample_decoder(features, text, pipeline.sampling.updated(width=width, height=height))
        return {STAGE_A: vqgan.decode(vqgan.encode(images)), STAGE_B: vqgan.decode(latents)}

    @property
    def decoder_stage(self) -> str:
        """The stage that trains the Stage B for this prior."""
        return DECODERS[release_of_model([self.net.params])]

    def reconstruct(
        self, net: Prior, images: Tensor, tokens: list[Tokens], sampling: SamplingSettings, *inputs: Tensor
    ) -> Tensor:
        """Generates images from the captions."""
        pipeline = self.pipeline(net)
        prior_text, decoder_text = self.text_states(pipeline, tokens)
        latents = pipeline.sample_decoder(pipeline.sample_prior(prior_text, sampling), decoder_text, sampling)
        decoded: Tensor = pipeline.require("vqgan").decode(latents)
        return decoded

    def text_states(self, pipeline: WuerstchenPipeline, tokens: list[Tokens]) -> tuple[Tensor, Tensor]:
        """Returns the states [B, 77 n, c] of captions of equally many chunks, for Stage C and for Stage B."""
        prior, decoder = (torch.stack(encode_text(pipeline.require(name), tokens)) for name in TOWERS)
        return prior, decoder
