"""Networks in diffusers' layout: a folder each, with the sizes in config.json beside the weights."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from ..models.prior import PriorParams
from .bundle import FORMAT, METADATA_KEY
from .components import Params
from .writer import write_tensors

FILE = "diffusion_pytorch_model.safetensors"
CLASSES = {"prior": "WuerstchenPrior", "decoder": "WuerstchenDiffNeXt", "vqgan": "PaellaVQModel"}
_VQGAN_NAMES = {"c_hidden": "embed_dim", "c_latent": "latent_channels", "codebook_size": "num_vq_embeddings"}
_UNKNOWN = ("feature_scale", "feature_shift", "self_attn")  # to diffusers


def component_config(name: str, params: Params) -> dict[str, Any]:
    """A network's sizes under diffusers' names."""
    values = asdict(params)
    if name == "vqgan":
        return {_VQGAN_NAMES.get(key, key): value for key, value in values.items()}
    return {key: list(x) if isinstance(x, tuple) else x for key, x in values.items() if key not in _UNKNOWN}


def component_key(key: str) -> str:
    """What diffusers calls a tensor of ours."""
    return key.replace("vquantizer.codebook.", "vquantizer.embedding.")


def config_text(name: str, params: Params) -> str:
    """The content of config.json."""
    return json.dumps({"_class_name": CLASSES[name], **component_config(name, params)}, indent=2)


def is_component(name: str, network: nn.Module) -> bool:
    """Whether diffusers has such a network: of v1 it knows Stage A alone."""
    scale = getattr(network.params, "feature_scale", PriorParams.feature_scale)
    return name in CLASSES and scale == PriorParams.feature_scale


def save_component(folder: Path, name: str, network: nn.Module, metadata: Mapping[str, Any]) -> None:
    """Write a network to a folder that diffusers' `from_pretrained` reads, each file whole or not at all."""
    params: Any = network.params
    told = {"format": "pt", METADATA_KEY: json.dumps({**metadata, "format": FORMAT})}  # diffusers asks for the first
    write_tensors(folder / FILE, {component_key(key): x for key, x in network.state_dict().items()}, told)
    draft = folder / ".config.json.part"
    draft.write_text(config_text(name, params), encoding="utf-8")
    os.replace(draft, folder / "config.json")
