"""Train Stage C: noise prediction on the frozen encoder's features, given text."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from ...checkpoints.components import text_width
from ...checkpoints.open import open_source
from ...checkpoints.release import release_of_model
from ...common.dataclass_config import from_table
from ...inference.pipeline import WuerstchenPipeline
from ...inference.settings import SamplingSettings
from ...models.decoder import Decoder
from ...models.prior import Prior, PriorParams, latents_from_features
from ...models.text_encoder import TextEncoder
from ...models.token_decoder import TokenDecoder
from ...models.vqgan import VQGAN
from ..rng import StepRandom
from .diffusion import NoisePrediction
from .losses import NoiseConfig
from .networks import encode_text, input_source, load_frozen, load_or_create, source_exists

log = logging.getLogger(__name__)

# Who paints the sheets of a release's prior: the stage, its part of a bundle, and the network.
PAINTERS: dict[str, tuple[str, str, type[nn.Module]]] = {
    "v1": ("token-decoder", "token_decoder", TokenDecoder),
    "v2": ("decoder", "decoder", Decoder),
}


class PriorStage(NoisePrediction[Prior]):
    """Stage C as the original trains it, on cached features."""

    name = "prior"

    def __init__(self, config: Mapping[str, Any]):
        self.noise = from_table(NoiseConfig, config.get("noise", {}), "noise")
        self.net = self.start(config)
        super().__init__(config)
        units = partial(latents_from_features, params=self.net.params)
        self.latents = self.dataset.map_images("features", self.encode_features, units)

    def start(self, config: Mapping[str, Any]) -> Prior:
        """The network before its first step."""
        return load_or_create(config, "prior", Prior, PriorParams)

    def given(self, picked: Any, rng: StepRandom) -> tuple[Tensor, ...]:
        return ()

    def reader(self, net: Prior) -> TextEncoder:
        """Who reads texts for `net`."""
        return self.tower

    def reconstruct(self, net: Prior, images: Tensor, prompts: list[str], sampling: SamplingSettings) -> Tensor | None:
        """The captions painted; only once there is a decoder to paint with, and a tower to read them to it."""
        stage, part, kind = PAINTERS[release_of_model([net.params])]
        sources = {name: input_source(self.config, name) for name in (stage, "vqgan")}
        if missing := [name for name, source in sources.items() if not source_exists(source)]:
            log.info("no sheet: it is painted by what [inputs] names as %s", " and ".join(missing))
            return None
        place = next(net.parameters()).device
        painter: dict[str, Any] = {part: load_frozen(self.config, stage, part, kind).to(place)}
        words = self._words(stage, painter[part], prompts)
        if words is None:
            return None
        vqgan = load_frozen(self.config, "vqgan", "vqgan", VQGAN).to(place)
        tower = self.reader(net).to(place)
        pipeline = WuerstchenPipeline(prior=net, vqgan=vqgan, prior_text_encoder=tower, **painter)
        text = encode_text(tower, prompts)
        return vqgan.decode(pipeline.sample_decoder(pipeline.sample_prior(text, sampling), words, sampling))

    def _words(self, stage: str, painter: Any, prompts: list[str]) -> Tensor | None:
        """Text states for the decoder `painter`: of the run's tower as it was, or where that is another's, such as
        CLIP-bigG, of the tower beside the decoder; None if there is none."""
        source, name = input_source(self.config, stage), "decoder_text_encoder"
        if text_width(painter.params) == self.tower.params.width:
            tower = self.tower
        elif name in open_source(source, headers_only=True).networks:
            tower = load_frozen(self.config, stage, name, TextEncoder)
        else:
            log.info("no sheet: %s holds no text encoder for the decoder", source)
            return None
        return encode_text(tower.to(next(painter.parameters()).device), prompts)

    def parts(self, net: Prior) -> dict[str, nn.Module]:
        return {"prior": net}
