"""The stages, and the dataclass of each table of their configurations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import Field, asdict
from typing import Any

from ..checkpoints.modelspec import Statement
from ..common.dataclass_config import from_table
from .config import RUN, LoopConfig
from .data.demo import DemoDataConfig
from .data.filters import ImageDataConfig
from .data.held_out import ValidationConfig
from .data.latent_cache import CacheConfig
from .data.sources import has_pictures
from .hub import HubConfig
from .stages.control import ControlStage
from .stages.decoder import DecoderStage
from .stages.distill import DecoderDistillLoraStage, DecoderDistillStage, DistillLoraStage, DistillStage
from .stages.embedding import DecoderEmbeddingStage, EmbeddingStage
from .stages.image_encoder import EncoderStage
from .stages.lora import DecoderLoraStage, LoraStage, TokenDecoderLoraStage
from .stages.prior import PriorStage
from .stages.text_encoder import TextStage
from .stages.token_decoder import TokenDecoderStage
from .stages.vqgan import VQGANStage

STAGES: dict[str, Any] = {  # classes by name; each is constructed with a configuration
    kind.name: kind
    for kind in (
        VQGANStage,
        EncoderStage,
        TextStage,
        DecoderStage,
        TokenDecoderStage,
        PriorStage,
        LoraStage,
        DecoderLoraStage,
        TokenDecoderLoraStage,
        EmbeddingStage,
        DecoderEmbeddingStage,
        DistillStage,
        DecoderDistillStage,
        DistillLoraStage,
        DecoderDistillLoraStage,
        ControlStage,
    )
}
COMMON: dict[str, Any] = {  # the keys and tables of every stage, but for [inputs]
    "run": RUN,
    "data": ImageDataConfig,
    "train": LoopConfig,
    "validation": ValidationConfig,
    "cache": CacheConfig,
    "modelspec": Statement,
    "hub": HubConfig,
}
KEPT = ("model", "cache")  # tables that `resolve` leaves as they are: of the network, and not of training


def tables_of(stage: str) -> dict[str, Any]:
    """Returns the dataclass of each table of a stage, and the field of each key at the top."""
    return {**COMMON, **STAGES[stage].tables}


def resolve(stage: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a configuration with all defaults but those of `[model]` and `[cache]`. ValueError for invalid tables."""
    resolved: dict[str, Any] = dict(config)
    for name, kind in tables_of(stage).items():
        if isinstance(kind, Field) or name in KEPT:
            continue
        table = config.get(name, {})
        if name == "data" and not has_pictures(table):
            kind = DemoDataConfig
        resolved[name] = asdict(from_table(kind, table, name))
    return resolved
