"""Trains a text encoder against the image encoder's features, with CLIP's contrastive loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...common.dataclass_config import from_table, option
from ...common.geometry import prior_side
from ...models.image_encoder import ImageEncoder
from ...models.prior import latents_from_features
from ...models.text_encoder import TextEncoder, TextEncoderParams
from ..config import START
from ..data.caption_tokens import CaptionTokenizer, Tokens
from ..data.dataset import ImageDataset, IndexedDataset
from ..data.files import open_dataset
from ..rng import StepRandom
from ..stage import Stage
from .losses import contrastive_loss
from .networks import encode_features, load_frozen, load_or_create, read_input


@dataclass(frozen=True)
class TextConfig:
    """The `[text]` table."""

    joint: int = option(128, "width of the joint space of texts and images")


class Contrast(nn.Module):
    """A text encoder, and two projections into the joint space, which are discarded after training."""

    def __init__(self, text_encoder: TextEncoder, features: int, joint: int):
        super().__init__()
        self.text_encoder = text_encoder
        self.text_projection = nn.Linear(text_encoder.params.width, joint, bias=False)
        self.picture_projection = nn.Sequential(nn.Linear(features, 2 * joint), nn.GELU(), nn.Linear(2 * joint, joint))
        self.scale = nn.Parameter(torch.tensor(14.3).log())  # CLIP's initial temperature, 0.07

    def embed_text(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Returns unit vectors [B, joint] of token ids [B, L], from the state of the end token."""
        states = self.text_encoder(ids, mask)[torch.arange(len(ids)), mask.sum(1) - 1]
        return F.normalize(self.text_projection(states).float(), dim=-1)

    def embed_images(self, features: Tensor) -> Tensor:
        """Returns unit vectors [B, joint] of features [B, 16, h, w] in the prior's space."""
        return F.normalize(self.picture_projection(features.flatten(1)).float(), dim=-1)

    def forward(self, ids: Tensor, mask: Tensor, features: Tensor) -> Tensor:
        """Returns the contrastive loss of pairs."""
        scale = self.scale.exp().clamp(max=100)
        return contrastive_loss(self.embed_text(ids, mask), self.embed_images(features), scale)


class TextStage(Stage[Contrast]):
    """Matches captions with the images that they describe."""

    name, part = "text", "text_encoder"
    tables = {"start": START, "model": TextEncoderParams, "text": TextConfig}
    fsdp_conflict = "the temperature of text"

    def __init__(self, config: Mapping[str, Any]):
        options = from_table(TextConfig, config.get("text", {}), "text")
        self.config, self.dataset = config, open_dataset(config)
        if self.dataset.weighted:
            raise ValueError("[[data.sources]] weight is not for text, whose loss compares whole batches: remove it")
        if self.dataset.masked:
            raise ValueError("[data] mask is not for text, whose loss compares whole pictures: remove it")
        self.tokenizer = CaptionTokenizer(cut=True)  # one vector describes a caption
        self.frozen = [self.encoder] if self.dataset.must_compute("features") else []
        self.features = self._features(self.dataset)
        if not self.dataset.square:
            raise ValueError("[data] must give squares of one size for text: set ratio to 1, and remove buckets")
        channels = read_input(config, "encoder").params.c_latent
        text_encoder = load_or_create(config, "prior_text_encoder", TextEncoder)
        self.net = Contrast(text_encoder, channels * prior_side(self.dataset.side) ** 2, options.joint)

    @cached_property
    def encoder(self) -> ImageEncoder:
        return load_frozen(self.config, "encoder", ImageEncoder)

    def _features(self, dataset: ImageDataset) -> Any:
        """Returns a function of batches to their features in the prior's space."""
        return dataset.map_images("features", lambda x: encode_features(self.encoder, x), latents_from_features)

    def prepare(self, picked: Any, step: int, rng: StepRandom) -> tuple[Any, ...]:
        features = self.features(picked)
        features += 0.3 * rng.normal(*features.shape[1:])
        return (*_join(self.tokenizer(self.dataset.captions(picked, rng))), features)

    def loss(self, net: Contrast, *batch: Any) -> Tensor:
        return net(*batch)

    def samples(self, net: Contrast, validation: IndexedDataset) -> list[Tensor]:
        """Returns images, and for each the one that its caption matches best."""
        device, picked = net.scale.device, validation.evenly_spaced(12)
        captions = validation.captions(picked, StepRandom(0, 0, len(picked)))
        ids, mask = (x.to(device) for x in _join(self.tokenizer.uncounted(captions)))
        self.encoder.to(device)
        features = self._features(validation)(slice(None)).to(device)
        matches = (net.embed_text(ids, mask) @ net.embed_images(features).T).argmax(1).cpu()
        return [validation.images(picked), validation.images(matches)]


def _join(tokens: list[Tokens]) -> tuple[Tensor, Tensor]:
    """Returns ids and mask [B, 77] of captions of one chunk."""
    ids, mask = zip(*tokens, strict=True)
    return torch.cat(ids), torch.cat(mask)
