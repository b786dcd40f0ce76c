"""Train Stage C: noise prediction on the frozen encoder's features, given text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..checkpoints.parts import release
from ..models.decoder import Decoder
from ..models.prior import Prior, PriorParams, latents_from_features
from ..models.token_decoder import TokenDecoder
from ..models.vqgan import VQGAN
from ..pipeline import WuerstchenPipeline
from ..sampling import Sampling
from ..tables import from_table
from .chance import Chance
from .diffusion import NoisePrediction
from .inputs import features_of, frozen, is_there, source_of, started
from .objectives import NoiseConfig

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
        self.latents = self.pictures.each(self._latents_of)

    def _latents_of(self, images: Tensor) -> Tensor:
        return latents_from_features(features_of(self.encoder, images), self.net.params)

    def start(self, config: Mapping[str, Any]) -> Prior:
        """The network before its first step."""
        return started(config, "prior", Prior, PriorParams)

    def given(self, picked: Any, chance: Chance) -> tuple[Tensor, ...]:
        return ()

    def reconstruct(self, net: Prior, images: Tensor, text: Tensor, sampling: Sampling) -> Tensor | None:
        """The captions painted; only once there is a decoder to paint with."""
        stage, part, kind = PAINTERS[release([net.params])]
        if not all(is_there(source_of(self.config, name)) for name in (stage, "vqgan")):
            return None
        place = next(net.parameters()).device
        painter: dict[str, Any] = {part: frozen(self.config, stage, part, kind).to(place)}
        vqgan = frozen(self.config, "vqgan", "vqgan", VQGAN).to(place)
        pipeline = WuerstchenPipeline(prior=net, vqgan=vqgan, prior_text_encoder=self.tower, **painter)
        return vqgan.decode(pipeline.sample_decoder(pipeline.sample_prior(text, sampling), text, sampling))

    def parts(self, net: Prior) -> dict[str, nn.Module]:
        return {"prior": net}
