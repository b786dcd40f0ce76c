"""Train a text tower against the semantic features of the pictures, by CLIP's contrastive loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ...common.dataclass_config import from_table
from ...common.geometry import prior_side
from ...models.image_encoder import ImageEncoder
from ...models.prior import latents_from_features
from ...models.text_encoder import TextEncoder, TextEncoderParams, tokenize
from ..data.files import open_dataset
from ..rng import StepRandom
from ..sample_grid import sample_grid
from ..stage import Stage
from .losses import contrastive_loss
from .networks import encode_features, load_frozen, load_or_create, read_input


@dataclass(frozen=True)
class TextConfig:
    """The `[text]` table."""

    joint: int = 128  # width of the space that texts and pictures meet in


class Contrast(nn.Module):
    """The tower, and two throw-away projections into the joint space."""

    def __init__(self, tower: TextEncoder, features: int, joint: int):
        super().__init__()
        self.tower = tower
        self.text_projection = nn.Linear(tower.params.width, joint, bias=False)
        self.picture_projection = nn.Sequential(nn.Linear(features, 2 * joint), nn.GELU(), nn.Linear(2 * joint, joint))
        self.scale = nn.Parameter(torch.tensor(14.3).log())  # CLIP's first temperature, 0.07

    def texts(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Unit vectors [B, joint] of token ids [B, L]: the state of the end token speaks for the whole."""
        states = self.tower(ids, mask)
        last = mask.sum(1) - 1
        return F.normalize(self.text_projection(states[torch.arange(len(ids)), last]).float(), dim=-1)

    def pictures(self, features: Tensor) -> Tensor:
        """Unit vectors [B, joint] of features [B, 16, h, w] in the prior's space."""
        return F.normalize(self.picture_projection(features.flatten(1)).float(), dim=-1)

    def forward(self, ids: Tensor, mask: Tensor, features: Tensor) -> Tensor:
        """The contrastive loss of pairs."""
        return contrastive_loss(self.texts(ids, mask), self.pictures(features), self.scale.exp().clamp(max=100))


class TextStage(Stage[Contrast]):
    """Captions in many wordings against the pictures that they name."""

    name = "text"
    tables = ("start", "model", "text")
    undivided = "the temperature of text"

    def __init__(self, config: Mapping[str, Any]):
        options = from_table(TextConfig, config.get("text", {}), "text")
        self.dataset = open_dataset(config)
        self.config = config
        self.frozen = (self.encoder,) if self.dataset.must_compute("features") else ()
        self.features = self.dataset.map_images("features", self._features_of, latents_from_features)
        if not self.dataset.square:
            raise ValueError("[data] the text stage learns from squares of one size: leave ratio at 1, and buckets out")
        channels = read_input(config, "encoder", "image_encoder").params.c_latent
        tower = load_or_create(config, "prior_text_encoder", TextEncoder, TextEncoderParams)
        self.net = Contrast(tower, channels * prior_side(self.dataset.side) ** 2, options.joint)

    @cached_property
    def encoder(self) -> ImageEncoder:
        return load_frozen(self.config, "encoder", "image_encoder", ImageEncoder)

    def _features_of(self, images: Tensor) -> Tensor:
        return encode_features(self.encoder, images)

    def batch(self, step: int, rng: StepRandom) -> tuple[Any, ...]:
        picked = self.dataset.sample_batch(rng)
        features = self.features(picked)
        features += 0.3 * rng.normal(*features.shape[1:])
        return (*tokenize(self.dataset.captions(picked, rng)), features)

    def loss(self, net: Contrast, *batch: Any) -> Tensor:
        return net(*batch)

    def sample_grid(self, net: Contrast) -> Image.Image | None:
        """Held-out pictures, and under each the one that its caption finds among them."""
        held = self.dataset.preview_images()
        if held is None:
            return None
        device, picked = net.scale.device, held.evenly_spaced(12)
        ids, mask = (x.to(device) for x in tokenize(held.captions(picked, StepRandom(0, 0, len(picked)))))
        self.encoder.to(device)
        features = held.map_images("features", self._features_of, latents_from_features)(slice(None)).to(device)
        found = (net.texts(ids, mask) @ net.pictures(features).T).argmax(1).cpu()
        return sample_grid([held.images(picked), held.images(found)])

    def parts(self, net: Contrast) -> dict[str, nn.Module]:
        return {"text_encoder": net.tower}
