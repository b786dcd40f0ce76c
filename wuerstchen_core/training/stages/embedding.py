"""Trains a textual inversion (arXiv 2208.01618): vectors of a new word for the text encoder of Stage C or Stage B."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checkpoints.embeddings import Embedding, read_embedding
from ...checkpoints.key_maps import COMFYUI_CLIPS
from ...checkpoints.modelspec import FIELD, adapter_header
from ...checkpoints.release import release_of
from ...checkpoints.writer import write_tensors
from ...common.dataclass_config import Count, from_table, option
from ...inference.embeddings import MARK, token_chunks
from ...inference.pipeline import WuerstchenPipeline
from ...models.decoder import Decoder
from ...models.int8 import use_int8
from ...models.prior import Prior
from ...models.text_encoder import TextEncoder, pad_tokens
from ...models.tokenizer import END, encode
from ..data.caption_tokens import CaptionTokenizer, Tokens
from ..samples import SampleConfig
from ..stage import N
from .decoder import DecoderStage
from .diffusion import TEXT_ENCODER
from .losses import DecoderNoiseConfig, NoiseConfig
from .networks import encode_text, frozen_dtype, input_source, load_frozen
from .prior import PriorStage
from .text_tower import TextTowerStage, attach_text_encoder, train_only

VECTORS = f"{TEXT_ENCODER}.token_embedding.vectors"
SLOTS = "slots"


@dataclass(frozen=True)
class EmbeddingConfig:
    """The `[embedding]` table."""

    name: str = option(meaning="name in prompts, after embedding:, and of the file")
    init: str = option("", "words whose vectors the training starts from, such as fox")
    vectors: Count = option(1, "number of vectors")
    token: str = option(
        "", "word of the captions that the vectors replace, else they come first; empty: embedding:NAME"
    )
    start: str = option("", "embedding file to go on from; vectors of the other text encoder in it are kept")

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w.-]+", self.name):
            raise ValueError(f"[embedding] name must be letters, digits, - and _, such as my-fox, got {self.name!r}")
        if not self.init.strip() and not self.start:
            raise ValueError("[embedding] lacks init or start: name words to start from, such as fox")


class TokenVectors(nn.Module):
    """A frozen token embedding, and vectors [n, width] whose ids follow those of its tokens."""

    def __init__(self, tokens: nn.Embedding, vectors: Tensor):
        super().__init__()
        self.weight = tokens.weight
        self.vectors = nn.Parameter(vectors)

    def forward(self, ids: Tensor) -> Tensor:
        slots = ids - len(self.weight)
        known = F.embedding(ids.clamp(max=len(self.weight) - 1), self.weight)
        return torch.where(slots[..., None] >= 0, F.embedding(slots.clamp(min=0), self.vectors).to(known), known)


class EmbeddingTokenizer(CaptionTokenizer):
    """Tokenizes captions with the vectors' ids in them, as prompts with `embedding:NAME` are read."""

    def __init__(self, config: EmbeddingConfig, vocab_size: int, cut: bool):
        super().__init__(cut)
        self.mark = f"{MARK}{config.name}"
        self.word = re.compile(rf"(?<!\w){re.escape(config.token or self.mark)}(?!\w)")
        self.others = re.compile(rf"{MARK}(?!{re.escape(config.name)}(?:[\s,]|$))")
        ids = vocab_size + torch.arange(config.vectors)
        self.slots = {config.name: Embedding({SLOTS: ids[:, None].float()})}

    def prompt(self, caption: str) -> str:
        """Returns a caption with `embedding:NAME`, which has no other embeddings; "" stays."""
        found, count = self.word.subn(f" {self.mark} ", caption)
        found = self.others.sub(MARK.replace(":", " :"), found)  # the same tokens, as plain words
        return found if count or not caption else f"{self.mark} {found}"

    def tokens(self, caption: str) -> Tokens:
        prompt = self.prompt(caption)
        try:
            chunks = token_chunks(prompt, self.slots, SLOTS, width=1)
        except ValueError:  # a weight such as (fox:inf): no prompt has it, so its parentheses are text
            chunks = token_chunks(re.sub(r"[()]", r"\\\g<0>", prompt), self.slots, SLOTS, width=1)
        return pad_tokens([[int(token) for token, _ in chunk] for chunk in chunks])


class EmbeddingTraining(TextTowerStage[N]):
    """Vectors of a new word in a network's text encoder, trained with the network's loss; all else is frozen."""

    part = ""
    comfyui_folder = "embeddings"
    comfyui_node = ""
    has_preview = True
    fsdp_conflict = "[embedding]"

    def __init__(self, config: Mapping[str, Any]):
        super().__init__(config)
        if self.dataset.trigger_words:
            raise ValueError(
                "[data] trigger_word is not for an embedding, whose word it is: set [embedding] token instead"
            )
        vocab_size = len(self.net.get_parameter(f"{TEXT_ENCODER}.token_embedding.weight"))
        self.dataset.tokenizer = EmbeddingTokenizer(self.embedding, vocab_size, self.dataset.tokenizer.cut)

    @property
    def stem(self) -> str:
        return self.embedding.name

    def build(self, config: Mapping[str, Any]) -> N:
        """Returns the network of `[inputs]` with its text encoder, whose vectors are the only trained weights."""
        if self.noise.slow_times:
            raise ValueError("[noise] slow_times is not for an embedding, which trains no time mappers: remove it")
        self.embedding = from_table(EmbeddingConfig, config.get("embedding", {}), "embedding")
        self.bases = [input_source(config, self.network), input_source(config, "text")]
        self.inputs = {name: x for name, x in self.inputs.items() if name != "text"}
        net: N = load_frozen(config, self.network, nn.Module)  # type: ignore[assignment]
        tower = load_frozen(config, "text", TextEncoder, self.text_part)
        vectors = self.first_vectors(tower.token_embedding)
        tower.token_embedding = TokenVectors(tower.token_embedding, vectors)
        attach_text_encoder(net, tower)
        if frozen_dtype(config) == torch.int8:
            use_int8(net)  # the text encoder's projections, which are separate now
        net.requires_grad_(False).get_parameter(VECTORS).requires_grad_(True)
        train_only(net)
        return net

    @property
    def clip(self) -> str:
        """ComfyUI's name of the text encoder."""
        return COMFYUI_CLIPS[self.network]

    def first_vectors(self, tokens: nn.Embedding) -> Tensor:
        """Returns the vectors of `start` or of `init`. ValueError if those of `start` do not fit."""
        config, width = self.embedding, tokens.weight.shape[1]
        if config.start and (vectors := read_embedding(config.start).vectors(self.clip, width)) is not None:
            if len(vectors) != config.vectors:
                raise ValueError(
                    f"[embedding] start: {config.start} has {len(vectors)} vectors, and vectors is {config.vectors}: "
                    "set the same number"
                )
            return vectors
        if not config.init.strip():
            raise ValueError(f"[embedding] start: {config.start} has no vectors of width {width}: set init too")
        ids = torch.tensor(encode(config.init))
        return tokens.weight.detach()[ids[torch.arange(config.vectors) % len(ids)]].float()

    def sampling(self) -> dict[str, Any]:
        return {}  # those of the model that it is for

    def trained(self, net: nn.Module) -> Embedding:
        """Returns the vectors in a network, and those of the other text encoder in `start`."""
        tensors = read_embedding(self.embedding.start).tensors if self.embedding.start else {}
        kept = {name: tensors[name] for name in COMFYUI_CLIPS.values() if name in tensors}
        return Embedding({**kept, self.clip: net.get_parameter(VECTORS).detach().float().cpu()})

    def save(self, path: Path, net: N, metadata: Mapping[str, Any]) -> None:
        words = {"trigger_words": [f"{MARK}{self.embedding.name}"], "title": self.embedding.name}
        metadata = {**metadata, FIELD: words | metadata.get(FIELD, {})}
        release = release_of(net.params)  # type: ignore[arg-type]
        header = adapter_header(self.network, metadata, release, kind="textual-inversion")
        write_tensors(path, self.trained(net).tensors, header)


class EmbeddingStage(EmbeddingTraining[Prior], PriorStage):
    """A new word for Stage C's text encoder, and Stage B's if that reads vectors of the same width."""

    name = "embedding"
    tables = {"noise": NoiseConfig, "embedding": EmbeddingConfig, "sample": SampleConfig}

    def pipeline(self, net: Prior) -> WuerstchenPipeline:
        pipeline = super().pipeline(net)
        pipeline.embeddings[self.embedding.name] = self.trained(net)
        return pipeline

    def use_weights(self, pipeline: WuerstchenPipeline, path: Path) -> None:
        pipeline.embeddings[self.embedding.name] = read_embedding(path)

    def text_states(self, pipeline: WuerstchenPipeline, tokens: list[Tokens]) -> tuple[Tensor, Tensor]:
        prior, decoder = pipeline.require("prior_text_encoder"), pipeline.require("decoder_text_encoder")
        states = torch.stack(encode_text(prior, tokens))
        if decoder is self.text_encoder:
            return states, states
        size = len(prior.token_embedding.weight)
        rows = [[[x for x in row[1 : row.index(END)] if x < size] for row in ids.tolist()] for ids, _ in tokens]
        return states, torch.stack(encode_text(decoder, [pad_tokens(chunks) for chunks in rows]))


class DecoderEmbeddingStage(EmbeddingTraining[Decoder], DecoderStage):
    """A new word for the text encoder of v2's Stage B."""

    name = "decoder-embedding"
    tables = {"noise": DecoderNoiseConfig, "embedding": EmbeddingConfig}
