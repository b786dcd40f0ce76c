"""Writes networks as diffusers and transformers read them: a folder each, with weights and config.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..common.atomic import link_file, write_text
from ..models.prior import PriorParams
from ..models.text_encoder import TextEncoderParams
from ..models.tokenizer import END, START
from .bundle import FORMAT, METADATA_KEY, AnyPart, tensors_of
from .components import COMPONENTS, TEXT_ENCODER, Params, Part, component, kind_of
from .folder_files import component_path, weights_in
from .key_maps import text_config, text_to_transformers, vqgan_key_to_diffusers
from .lazy import LazyTensor
from .modelspec import spec_header
from .quant import quantize
from .release import release_of
from .weight_files import is_safetensors, read_weight_file
from .writer import Progress, write_tensors

CLASSES = {kind: entry.diffusers_class for kind, entry in COMPONENTS.items() if entry.diffusers_class}
TEXT_CLASS = "CLIPTextModel"
FILE, TEXT_FILE = "diffusion_pytorch_model.safetensors", "model.safetensors"
CONFIG = "config.json"
_NAMES = {"c_hidden": "embed_dim", "c_latent": "latent_channels", "codebook_size": "num_vq_embeddings"}  # of a VQGAN
_BLOCKS = {"C", "T", "A"}  # of Stage B that diffusers has: not "F"
_NOT_IN_DIFFUSERS = ("feature_scale", "feature_shift", "self_attn")


def config_text(name: str, params: Params) -> str:
    """Returns the content of config.json: a network's params under diffusers' or transformers' names."""
    if isinstance(params, TextEncoderParams):
        return json.dumps(_text_config(params), indent=2)
    values = {_NAMES.get(key, key) if name == "vqgan" else key: value for key, value in asdict(params).items()}
    config = {key: value for key, value in values.items() if key not in _NOT_IN_DIFFUSERS}
    return json.dumps({"_class_name": CLASSES[name], **config}, indent=2)


def _text_config(params: TextEncoderParams) -> dict[str, Any]:
    return {
        "architectures": [TEXT_CLASS],
        "model_type": "clip_text_model",
        **text_config(params),
        "projection_dim": params.width,
        "bos_token_id": START,
        "pad_token_id": END,
    }


def is_in_diffusers(name: str, network: AnyPart | nn.Module) -> bool:
    """True if diffusers or transformers has this network; of v1 they have Stage A and the text encoder only."""
    params: Any = network.params
    units = getattr(params, "feature_scale", PriorParams.feature_scale)
    known = kind_of(name) in (*CLASSES, TEXT_ENCODER) and units == PriorParams.feature_scale
    blocks = set("".join(getattr(params, "level_config", ())))
    return known and getattr(params, "self_attn", True) and blocks <= _BLOCKS


def save_component(
    folder: Path,
    name: str,
    part: AnyPart,
    metadata: Mapping[str, Any],
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> Path:
    """Writes a network to a folder for `from_pretrained`, and returns the file of its weights.

    Floating-point tensors are stored in `dtype` (None: unchanged). A file that has them already, under the same names,
    is linked. Each file appears complete, or not at all.
    """
    params: Any = part.params
    tensors = _tensors(name, part, dtype)
    file = folder / (TEXT_FILE if kind_of(name) == TEXT_ENCODER else FILE)
    if (source := _equal_file(part, tensors)) is not None:
        for x in tensors.values():
            x.load()  # raises ValueError for what must not be written
        link_file(source, file)
    else:
        header = {"format": "pt", METADATA_KEY: json.dumps({**metadata, "format": FORMAT})}  # diffusers needs the first
        write_tensors(file, tensors, header | spec_header([name], metadata, release_of(params)), progress)
    content = config_text(name, params)
    write_text(folder / CONFIG, content)
    return file


def _tensors(name: str, part: AnyPart, dtype: torch.dtype | None) -> dict[str, LazyTensor]:
    """Returns a network's tensors under diffusers' or transformers' names."""
    state = component(name).to_ours(tensors_of(part))
    if kind_of(name) == TEXT_ENCODER:
        state = {f"text_model.{key}": x for key, x in text_to_transformers(state).items()}
    stored: dict[str, LazyTensor] = {}
    for key, x in state.items():
        plain = LazyTensor(x.shape, x.dtype, x.load)  # restored if the file has 8 bits, which diffusers does not read
        stored |= quantize(vqgan_key_to_diffusers(key), plain, dtype)
    return stored


def _equal_file(part: AnyPart, tensors: Mapping[str, LazyTensor]) -> Path | None:
    """Returns the file that a part is read from if it has just these tensors, by name, shape and dtype."""
    if not isinstance(part, Part) or part.path is None:
        return None
    file: Path | None = part.path
    if part.path.is_dir() and (file := weights_in(part.path)) is None:
        folder = component_path(part.path, part.name)
        file = weights_in(folder) if folder and folder.is_dir() else folder
    if file is None or not is_safetensors(file):
        return None
    content = read_weight_file(file)
    found = {key: (tuple(x.shape), x.dtype) for key, x in content.states[""].items()}
    same = found == {key: (tuple(x.shape), x.dtype) for key, x in tensors.items()}
    return file if same and content.metadata.get("format") == "pt" else None
