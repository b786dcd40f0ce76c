"""Train Stage C: noise prediction on the frozen encoder's features, given text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ..diffusion.samplers import ddpm_step, guided, sample, seeded_noise
from ..diffusion.schedule import diffuse, linear_times
from ..models.decoder import Decoder
from ..models.image_encoder import ImageEncoder
from ..models.prior import Prior, PriorParams, features_from_latents, latents_from_features
from ..models.text_encoder import TextEncoder
from ..models.vqgan import VQGAN
from .config import from_table
from .inputs import features_of, frozen, text_states
from .loop import Stage
from .objectives import NoiseConfig, draw_times, noise_loss
from .pictures import DemoPictures, sheet


class PriorStage(Stage[Prior]):
    """Stage C as the original trains it, on cached features."""

    name = "prior"
    tables = ("noise",)
    text_drop = 0.05

    def __init__(self, config: Mapping[str, Any]):
        self.config = config
        self.noise = from_table(NoiseConfig, config.get("noise", {}), "noise")
        self.net = Prior(from_table(PriorParams, config["model"], "model"))
        self.net.init_weights()
        self.pictures = DemoPictures(config)
        self.held = DemoPictures(config, held=True)
        encoder = frozen(config, "encoder", "image_encoder", ImageEncoder)
        self.tower = frozen(config, "text", "prior_text_encoder", TextEncoder)
        self.latents = latents_from_features(features_of(encoder, self.pictures))

    def batch(self, size: int, rng: torch.Generator) -> tuple[Any, ...]:
        picked = self.pictures.pick(size, rng)
        text = text_states(self.tower, self.pictures.captions(picked, rng, self.text_drop))
        t = draw_times(self.noise, size, rng)
        noise = torch.randn(self.latents[picked].shape, generator=rng)
        return diffuse(self.latents[picked], t, noise), t, text, noise

    def loss(self, net: Prior, *batch: Any) -> Tensor:
        latents, t, text, noise = batch
        return noise_loss(self.noise, net(latents, t, text), noise, t)

    def sheet(self, net: Prior) -> Image.Image | None:
        """Held-out prompts painted, truth above; only once the run has a decoder to paint with."""
        if not (Path(self.config["run"]) / "decoder" / "decoder.safetensors").exists():
            return None
        decoder = frozen(self.config, "decoder", "decoder", Decoder)
        vqgan = frozen(self.config, "vqgan", "vqgan", VQGAN)
        picked = self.held.spread(24)
        text = text_states(self.tower, self.held.captions(picked, torch.Generator().manual_seed(0)))
        uncond = text_states(self.tower, [""] * len(picked))
        draw = seeded_noise(0, len(picked))
        start = draw(torch.empty(len(picked), *self.latents.shape[1:]))
        model = guided(net, (text,), (uncond,), 3.0)
        features = features_from_latents(sample(model, start, linear_times(20), draw=draw, step=ddpm_step))
        truth = self.held.view(picked)
        start = draw(torch.empty(len(picked), 4, truth.shape[-2] // 4, truth.shape[-1] // 4))
        latents = sample(lambda x, t: decoder(x, t, features, text), start, linear_times(12), draw=draw)
        out = vqgan.decode(latents * vqgan.params.scale_factor)
        return sheet([truth[:12], out[:12], truth[12:], out[12:]])

    def parts(self, net: Prior) -> dict[str, nn.Module]:
        return {"prior": net}
