"""Trains adapters of Stage C or Stage B, and of its text encoder: LoRA, DoRA, LoHa or LoKr."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...common.dataclass_config import from_table
from ...inference.pipeline import WuerstchenPipeline
from ...models.attention import split_projections
from ...models.decoder import Decoder
from ...models.int8 import use_int8
from ...models.prior import Prior
from ...models.text_encoder import TextEncoder
from ...models.token_decoder import TokenDecoder
from ..samples import SampleConfig
from ..stage import BASE_TITLE, N
from .adapters import AdapterConfig, attach
from .decoder import DecoderStage
from .lora_output import load_adapters, write_lora
from .losses import DecoderNoiseConfig, NoiseConfig, TokenNoiseConfig
from .networks import frozen_dtype, input_source, load_frozen
from .prior import PriorStage
from .text_tower import TextTowerStage, attach_text_encoder
from .token_decoder import TokenDecoderStage


class AdapterStage(TextTowerStage[N]):
    """Adapters of a network, and of its text encoder, trained with the network's loss."""

    part = ""
    comfyui_folder = "loras"
    comfyui_node = "Würstchen LoRA Loader"
    has_preview = True

    def __init__(self, config: Mapping[str, Any]):
        super().__init__(config)
        if self.adapters.text_targets:
            self.text_source = ""

    def build(self, config: Mapping[str, Any]) -> N:
        """Returns the network of `[inputs]` with adapters; with the text encoder as a submodule if that is adapted."""
        if self.noise.slow_times:
            raise ValueError("[noise] slow_times is not for a LoRA, which trains no time mappers: remove it")
        self.adapters = from_table(self.tables["lora"], config.get("lora", {}), "lora")
        if self.adapters.kind == "dora" and frozen_dtype(config) == torch.int8:
            raise ValueError('[lora] kind = "dora" does not work with [train] frozen = "int8": set it to "bf16"')
        stage = self.network.replace("_", "-")
        self.bases = [input_source(config, stage)]
        net: N = load_frozen(config, stage, nn.Module)  # type: ignore[assignment]
        split_projections(net)
        if self.adapters.text_targets:
            self.inputs = {name: x for name, x in self.inputs.items() if name != "text"}
            self.bases.append(input_source(config, "text"))
            attach_text_encoder(net, load_frozen(config, "text", TextEncoder, self.text_part))
        if (dtype := frozen_dtype(config)) != torch.float32:
            self.fsdp_conflict = "[train] frozen"
        if dtype == torch.int8:
            use_int8(net)  # the text encoder's projections, which are separate now
        self.layers = attach(net, self.adapters)
        if self.adapters.start:
            load_adapters(net, self.adapters, self.layers)
        return net

    def sampling(self) -> dict[str, Any]:
        return {}  # those of the model that it is applied to

    @property
    def start_title(self) -> str:
        return f"{BASE_TITLE} + {Path(self.adapters.start).name}" if self.adapters.start else BASE_TITLE

    def publish(self, file: Path, folder: Path, metadata: Mapping[str, Any]) -> None:
        load_adapters(self.net, replace(self.adapters, start=str(file)), self.layers)
        path = folder / f"{self.stem}.safetensors"
        write_lora(path, self.net, self.adapters, self.layers, metadata, self.network)

    def save(self, path: Path, net: N, metadata: Mapping[str, Any]) -> None:
        newest = Path(self.config["run"]) / self.name / f"{self.stem}.safetensors"  # others are kept or exported
        write_lora(path, net, self.adapters, self.layers, metadata, self.network, for_others=path == newest)


class LoraStage(AdapterStage[Prior], PriorStage):
    """Adapters of a prior."""

    name = "lora"
    tables = {"noise": NoiseConfig, "lora": AdapterConfig, "sample": SampleConfig}

    def base_pipeline(self) -> WuerstchenPipeline:
        return self.pipeline(load_frozen(self.config, "prior", Prior).to(next(self.net.parameters()).device))

    def use_weights(self, pipeline: WuerstchenPipeline, path: Path) -> None:
        pipeline.unload_lora()
        pipeline.load_lora(path)


class DecoderLoraStage(AdapterStage[Decoder], DecoderStage):
    """Adapters of v2's Stage B."""

    name = "decoder-lora"
    tables = {"noise": DecoderNoiseConfig, "lora": AdapterConfig}


class TokenDecoderLoraStage(AdapterStage[TokenDecoder], TokenDecoderStage):
    """Adapters of v1's Stage B."""

    name = "token-decoder-lora"
    comfyui_folder = ""
    tables = {"noise": TokenNoiseConfig, "lora": AdapterConfig}
