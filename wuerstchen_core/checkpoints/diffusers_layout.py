"""Writes networks in diffusers' layout: a folder per network with its weights and, in config.json, its params."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from torch import nn

from ..common.atomic import replace_file
from ..models.prior import PriorParams
from .bundle import FORMAT, METADATA_KEY
from .components import COMPONENTS, Params
from .key_maps import vqgan_key_to_diffusers
from .modelspec import spec_header
from .release import release_of
from .writer import write_tensors

CLASSES = {kind: entry.diffusers_class for kind, entry in COMPONENTS.items() if entry.diffusers_class}
FILE = "diffusion_pytorch_model.safetensors"
_NAMES = {"c_hidden": "embed_dim", "c_latent": "latent_channels", "codebook_size": "num_vq_embeddings"}  # of a VQGAN
_NOT_IN_DIFFUSERS = ("feature_scale", "feature_shift", "self_attn")


def config_text(name: str, params: Params) -> str:
    """Returns the content of config.json: a network's params under diffusers' names."""
    values = {_NAMES.get(key, key) if name == "vqgan" else key: value for key, value in asdict(params).items()}
    config = {key: value for key, value in values.items() if key not in _NOT_IN_DIFFUSERS}
    return json.dumps({"_class_name": CLASSES[name], **config}, indent=2)


def is_in_diffusers(name: str, network: nn.Module) -> bool:
    """True if diffusers has this network; of v1 it has Stage A only."""
    units = getattr(network.params, "feature_scale", PriorParams.feature_scale)
    return name in CLASSES and units == PriorParams.feature_scale


def save_component(folder: Path, name: str, network: nn.Module, metadata: Mapping[str, Any]) -> None:
    """Writes a network to a folder for diffusers' `from_pretrained`; each file appears complete, or not at all."""
    header = {"format": "pt", METADATA_KEY: json.dumps({**metadata, "format": FORMAT})}  # diffusers needs the first
    header |= spec_header([name], metadata, release_of(cast(Params, network.params)))
    state = {vqgan_key_to_diffusers(key): x for key, x in network.state_dict().items()}
    write_tensors(folder / FILE, state, header)
    text = config_text(name, cast(Params, network.params))
    replace_file(folder / "config.json", lambda draft: draft.write_text(text, encoding="utf-8"))
