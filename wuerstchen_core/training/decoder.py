"""Train Stage B of v2: noise prediction on Stage A latents, given features of the frozen encoder and text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ..diffusion.samplers import ddim_step, sample, seeded_noise
from ..diffusion.schedule import diffuse, linear_times
from ..models.decoder import Decoder, DecoderParams
from ..models.image_encoder import ImageEncoder
from ..models.text_encoder import TextEncoder
from ..models.vqgan import VQGAN
from .config import from_table
from .inputs import features_of, frozen, latents_of, text_states
from .loop import Stage
from .objectives import NoiseConfig, corrupt_features, draw_times, noise_loss
from .pictures import DemoPictures, sheet


class DecoderStage(Stage[Decoder]):
    """v2's Stage B; no script of it was ever published, so noise, drops and weights are those of v1's and Stage C's."""

    name = "decoder"
    tables = ("noise",)
    text_drop = 0.05

    def __init__(self, config: Mapping[str, Any]):
        self.noise = from_table(NoiseConfig, config.get("noise", {}), "noise")
        self.net = Decoder(from_table(DecoderParams, config["model"], "model"))
        self.net.init_weights()
        self.pictures = DemoPictures(config)
        self.held = DemoPictures(config, held=True)
        encoder = frozen(config, "encoder", "image_encoder", ImageEncoder)
        self.vqgan = frozen(config, "vqgan", "vqgan", VQGAN)
        self.tower = frozen(config, "text", "prior_text_encoder", TextEncoder)
        self.features = features_of(encoder, self.pictures)
        self.latents = latents_of(self.vqgan, self.pictures)
        self.held_features = features_of(encoder, self.held)

    def batch(self, size: int, rng: torch.Generator) -> tuple[Any, ...]:
        picked = self.pictures.pick(size, rng)
        text = text_states(self.tower, self.pictures.captions(picked, rng, self.text_drop))
        features = corrupt_features(self.features[picked], rng)
        t = draw_times(self.noise, size, rng)
        noise = torch.randn(self.latents[picked].shape, generator=rng)
        return diffuse(self.latents[picked], t, noise), t, features, text, noise

    def loss(self, net: Decoder, *batch: Any) -> Tensor:
        latents, t, features, text, noise = batch
        return noise_loss(self.noise, net(latents, t, features, text), noise, t)

    def sheet(self, net: Decoder) -> Image.Image:
        """Held-out pictures, and under each what is left of it after 42.67x compression."""
        picked = self.held.spread(24)
        features = self.held_features[picked]
        text = text_states(self.tower, self.held.captions(picked, torch.Generator().manual_seed(0)))
        draw = seeded_noise(0, len(picked))
        start = draw(torch.empty(len(picked), *self.latents.shape[1:]))
        latents = sample(lambda x, t: net(x, t, features, text), start, linear_times(12), draw=draw, step=ddim_step)
        out = self.vqgan.decode(latents * self.vqgan.params.scale_factor)
        truth = self.held.view(picked)
        return sheet([truth[:12], out[:12], truth[12:], out[12:]])

    def parts(self, net: Decoder) -> dict[str, nn.Module]:
        return {"decoder": net}
