"""What the trainers of Stages B and C share: latents computed once, noised, and cleaned given text."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

from PIL import Image
from torch import Tensor

from ...checkpoints.components import text_width, tower_name
from ...diffusion.schedule import diffuse
from ...inference.settings import SamplingSettings
from ...models.image_encoder import ImageEncoder
from ...models.text_encoder import TextEncoder
from ..data.files import open_dataset
from ..rng import StepRandom
from ..sample_grid import sample_grid
from ..stage import N, Stage
from .losses import NoiseConfig, TimesConfig, draw_times, freeze_quick_times, noise_loss
from .networks import encode_features, encode_text, load_frozen, read_input


class DiffusionStage(Stage[N]):
    """A network that knows noise from pictures."""

    tables: tuple[str, ...] = ("start", "model", "noise")
    noise: TimesConfig
    reads = "prior_text_encoder"  # through this tower of a source that holds two
    # What is asked of pictures, and the network that computes it: only read where it has to, or when a sheet needs it.
    networks: Mapping[str, str] = {"features": "encoder", "text": "tower"}

    def __init__(self, config: Mapping[str, Any]):
        if self.noise.slow_times:
            freeze_quick_times(self.net)
            self.undivided = "[noise] slow_times"
        self.config = config
        self.dataset = open_dataset(config, tower=self.reads)
        self.frozen = tuple(
            getattr(self, self.networks[name]) for name in self.networks if self.dataset.must_compute(name)
        )
        params: Any = self.net.params
        width, needed = read_input(config, "text", self.reads).params.width, text_width(params)
        if needed is not None and width != needed:
            raise ValueError(
                f"this {self.name} reads the text through {tower_name(needed)}, but what [inputs] names as text is "
                f"{tower_name(width)}: name another, or, to start from nothing, give [model] its width"
            )
        self.text = self.texts()

    @cached_property
    def encoder(self) -> ImageEncoder:
        return load_frozen(self.config, "encoder", "image_encoder", ImageEncoder)

    @cached_property
    def tower(self) -> TextEncoder:
        return load_frozen(self.config, "text", self.reads, TextEncoder)

    def encode_features(self, images: Tensor) -> Tensor:
        """Features [B, 16, h, w] of pictures [B, 3, H, W] in [0, 1]."""
        return encode_features(self.encoder, images)

    def texts(self) -> Callable[[Any, StepRandom, float], Tensor]:
        """What the network is given of the captions of pictures, a share of which is dropped: their states."""
        return self.dataset.map_captions(lambda prompts: encode_text(self.tower, prompts))

    @abstractmethod
    def noised(self, picked: Any, t: Tensor, rng: StepRandom) -> tuple[Tensor, ...]:
        """The pictures `picked` noised to times t [B], and what the loss compares the network's answer with."""

    @abstractmethod
    def given(self, picked: Any, rng: StepRandom) -> tuple[Tensor, ...]:
        """What the network is given of the pictures `picked`, beside their text."""

    @abstractmethod
    def reconstruct(self, net: N, images: Tensor, prompts: list[str], sampling: SamplingSettings) -> Tensor | None:
        """What `net` makes of pictures [B, 3, H, W] in [0, 1] with these captions; None if it can't yet."""

    def batch(self, step: int, rng: StepRandom) -> tuple[Any, ...]:
        picked = self.dataset.sample_batch(rng)
        text = self.text(picked, rng, self.noise.text_drop)
        given = self.given(picked, rng)
        t = draw_times(self.noise, step, rng)
        return *self.noised(picked, t, rng), t, *given, text

    def sample_grid(self, net: N) -> Image.Image | None:
        """Held-out pictures, and under each what the network makes of it."""
        held = self.dataset.preview_images()
        if held is None:
            return None
        picked = held.evenly_spaced(24)
        prompts = held.captions(picked, StepRandom(0, 0, len(picked)))
        truth = held.images(picked)
        height, width = truth.shape[-2:]
        sampling = SamplingSettings(
            width, height, schedule="linear", prior_steps=20, prior_guidance=3.0, decoder_steps=12
        )
        out = self.reconstruct(net, truth, prompts, sampling)
        return None if out is None else sample_grid([truth[:12], out[:12], truth[12:], out[12:]])


class NoisePrediction(DiffusionStage[N]):
    """A network that predicts the noise in `latents`."""

    noise: NoiseConfig
    latents: Callable[[Any], Tensor]  # of the pictures of a batch

    def noised(self, picked: Any, t: Tensor, rng: StepRandom) -> tuple[Tensor, ...]:
        latents = self.latents(picked)
        noise = rng.normal(*latents.shape[1:])
        return diffuse(latents, t, noise), noise

    def loss(self, net: N, *batch: Any) -> Tensor:
        latents, noise, t, *given = batch
        return noise_loss(self.noise, net(latents, t, *given), noise, t)
