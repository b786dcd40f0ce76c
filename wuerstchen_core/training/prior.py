"""Train Stage C: noise prediction on the frozen encoder's features, given text."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..checkpoints.parts import release
from ..models.decoder import Decoder
from ..models.prior import Prior, PriorParams, latents_from_features
from ..models.text_encoder import TextEncoder
from ..models.token_decoder import TokenDecoder
from ..models.vqgan import VQGAN
from ..pipeline import WuerstchenPipeline
from ..sampling import Sampling
from ..tables import from_table
from .chance import Chance
from .diffusion import NoisePrediction
from .inputs import frozen, is_there, source_of, started, text_states
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
        units = partial(latents_from_features, params=self.net.params)
        self.latents = self.pictures.each("features", self.features_of, units)

    def start(self, config: Mapping[str, Any]) -> Prior:
        """The network before its first step."""
        return started(config, "prior", Prior, PriorParams)

    def given(self, picked: Any, chance: Chance) -> tuple[Tensor, ...]:
        return ()

    def reader(self, net: Prior) -> TextEncoder:
        """Who reads texts for `net`."""
        return self.tower

    def reconstruct(self, net: Prior, images: Tensor, prompts: list[str], sampling: Sampling) -> Tensor | None:
        """The captions painted; only once there is a decoder to paint with."""
        stage, part, kind = PAINTERS[release([net.params])]
        if not all(is_there(source_of(self.config, name)) for name in (stage, "vqgan")):
            return None
        place = next(net.parameters()).device
        painter: dict[str, Any] = {part: frozen(self.config, stage, part, kind).to(place)}
        vqgan = frozen(self.config, "vqgan", "vqgan", VQGAN).to(place)
        tower = self.reader(net).to(place)
        pipeline = WuerstchenPipeline(prior=net, vqgan=vqgan, prior_text_encoder=tower, **painter)
        text = words = text_states(tower, prompts)
        if tower is not self.tower:  # which the decoder goes on reading with
            words = text_states(self.tower.to(place), prompts)
        return vqgan.decode(pipeline.sample_decoder(pipeline.sample_prior(text, sampling), words, sampling))

    def parts(self, net: Prior) -> dict[str, nn.Module]:
        return {"prior": net}
