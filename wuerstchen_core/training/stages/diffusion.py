"""Shared by the trainers of Stages B and C: noise prediction from latents, given text."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ...checkpoints.components import text_width, tower_name
from ...diffusion.schedule import diffuse
from ...inference.settings import SamplingSettings
from ...models.image_encoder import ImageEncoder
from ...models.text_encoder import TextEncoder
from ..data.caption_tokens import Tokens
from ..data.dataset import IndexedDataset
from ..data.files import open_dataset
from ..rng import StepRandom
from ..stage import N, Stage
from .losses import NoiseConfig, TimesConfig, draw_noise, draw_times, freeze_fast_times, noise_loss, resize_weights
from .networks import encode_text, input_source, load_frozen, read_input

TEXT_ENCODER = "text_encoder"  # the submodule of a network that is trained together with its text encoder


class DiffusionStage(Stage[N]):
    """Predicts the noise in `latents` from noised latents, conditioning and text.

    A subclass sets `net` and `noise`, then calls `super().__init__`, then sets `latents`.
    """

    noise: TimesConfig
    has_large_frozen = True
    network: str  # the part of a bundle that `net` is
    latents: Callable[[Any], Tensor]  # maps a batch of `dataset` to latents
    validation_noise: TimesConfig = NoiseConfig(stratified=True, text_drop=0.0, weight="v")
    text_part = "prior_text_encoder"  # the part to load from a source with two text encoders
    # The attribute with the network that computes each input of `net`.
    inputs: Mapping[str, str] = {"features": "encoder", "text": "text_encoder"}

    def __init__(self, config: Mapping[str, Any]):
        if self.noise.slow_times:
            freeze_fast_times(self.net)
            self.fsdp_conflict = "[noise] slow_times"
        self.config = config
        self.dataset = open_dataset(config, text_part=self.text_part)
        # A network whose results are cached is loaded only if `samples` needs it.
        self.frozen = [
            getattr(self, network) for name, network in self.inputs.items() if self.dataset.must_compute(name)
        ]
        params: Any = self.net.params
        width, expected = read_input(config, "text", self.text_part).params.width, text_width(params)
        if expected is not None and width != expected:
            raise ValueError(
                f"the {self.name} needs text states of {tower_name(expected)}, but the text encoder under [inputs] is "
                f"{tower_name(width)}: name another as text, or give a new network its width under [model]"
            )
        self.text_source = input_source(config, "text")
        self.text = self.text_inputs()

    @cached_property
    def encoder(self) -> ImageEncoder:
        return load_frozen(self.config, "encoder", ImageEncoder)

    @cached_property
    def text_encoder(self) -> TextEncoder:
        return load_frozen(self.config, "text", TextEncoder, self.text_part)

    def text_inputs(self) -> Callable[[Any, StepRandom, float], tuple[Tensor, Tensor | None]]:
        """Returns a function that maps a batch, rng and `text_drop` to text states [B, 77 n, c] and their mask."""
        return self.dataset.map_captions(lambda tokens: encode_text(self.text_encoder, tokens))

    def conditioning(self, picked: Any, rng: StepRandom) -> tuple[Tensor, ...]:
        """Returns the network's arguments between the times and the text."""
        return ()

    def noised(self, picked: Any, t: Tensor, rng: StepRandom) -> tuple[Tensor, ...]:
        """Returns the network's noisy input at times t [B], then the tensors that the loss compares its output with."""
        assert isinstance(self.noise, NoiseConfig)
        latents = self.latents(picked)
        added, predicted = draw_noise(self.noise, latents.shape[1:], rng)
        return diffuse(latents, t, added), predicted

    @abstractmethod
    def reconstruct(
        self, net: N, images: Tensor, tokens: list[Tokens], sampling: SamplingSettings, *inputs: Tensor
    ) -> Tensor:
        """Returns samples [B, 3, H, W] for images, captions of equally many chunks, and `sample_inputs`."""

    def sample_inputs(self, validation: IndexedDataset, picked: Tensor) -> list[Tensor]:
        """Returns further images [B, 3, H, W] that samples are made from, to be shown beside them."""
        return []

    def prepare(self, picked: Any, step: int, rng: StepRandom) -> tuple[Any, ...]:
        text, mask = self.text(picked, rng, self.noise.text_drop)
        conditioning = self.conditioning(picked, rng)
        t = draw_times(self.noise, step, rng)
        noised, *targets = self.noised(picked, t, rng)
        weights = resize_weights(self.dataset.loss_weights(picked), noised.shape[-2:])
        return weights, noised, *targets, t, *conditioning, text, mask

    def loss(self, net: N, *batch: Any) -> Tensor:
        assert isinstance(self.noise, NoiseConfig)
        weights, latents, noise, t, *cond = batch
        return noise_loss(self.noise, net(latents, t, *cond), noise, t, weights)

    def validation_loss(self, net: N, picked: Any, rng: StepRandom) -> Tensor:
        """Returns the loss at evenly spread times, whatever the table [noise] is; no caption or feature is dropped."""
        configured, self.noise = self.noise, self.validation_noise
        try:
            return super().validation_loss(net, picked, rng)
        finally:
            self.noise = configured

    def samples(self, net: N, validation: IndexedDataset) -> list[Tensor]:
        picked = validation.evenly_spaced(24)
        images, prompts = validation.images(picked), validation.captions(picked, StepRandom(0, 0, len(picked)))
        inputs = self.sample_inputs(validation, picked)
        height, width = images.shape[-2:]
        sampling = SamplingSettings(
            width, height, schedule="linear", prior_steps=20, prior_guidance=3.0, decoder_steps=12
        )
        tokens, rows = self.dataset.tokenizer.uncounted(prompts), [images, *inputs]
        chunks = torch.tensor([len(ids) for ids, _ in tokens])
        for network, settings in self.compared(net, sampling):
            samples = torch.empty_like(images)
            for count in chunks.unique():
                indices = (chunks == count).nonzero().flatten()
                own, extra = [tokens[i] for i in indices.tolist()], [x[indices] for x in inputs]
                samples[indices] = self.reconstruct(network, images[indices], own, settings, *extra).to(samples)
            rows.append(samples)
        return rows

    def compared(self, net: N, sampling: SamplingSettings) -> list[tuple[N, SamplingSettings]]:
        """Returns the networks whose samples a grid shows, with the settings of each; `net` is the last."""
        return [(net, sampling)]
