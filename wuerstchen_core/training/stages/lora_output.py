"""Trained adapters as files for ComfyUI, diffusers and peft, and files as the adapters that training goes on from."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...checkpoints.adapters import Adapter, keys_of, rank_of
from ...checkpoints.key_maps import COMFYUI_CLIPS
from ...checkpoints.lora_config import PEFT_CONFIG
from ...checkpoints.lora_files import NETWORK_PREFIX, read_lora
from ...checkpoints.lora_keys import PEFT_PREFIX
from ...checkpoints.modelspec import adapter_header
from ...checkpoints.release import release_of
from ...checkpoints.writer import write_tensors
from ...common.atomic import write_text
from ...common.text import listed
from .adapters import LINEAR, AdapterConfig, Layer, peft_config

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"  # which diffusers' `load_lora_weights` looks for in a folder
PEFT_FILE = "adapter_model.safetensors"
TEXT = "text_encoder.text_model."

_KEY = re.compile(
    r"(.+)\.(lora_A|lora_B|lora_magnitude_vector|hada_w[12]_[ab]|lokr_w[12](?:_[ab])?)\.default(?:\.weight)?"
)
_COMFYUI = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "lora_magnitude_vector": "dora_scale"}
_DIFFUSERS = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}
_READ = {"lora_A": "lora_down.weight", "lora_B": "lora_up.weight", "lora_magnitude_vector": "dora_scale"}
_SCALED = ("lora_B", "hada_w1_a", "lokr_w1", "lokr_w1_a")  # the factor that has the scale; an adapter has one of them

Tensors = dict[str, dict[str, Tensor]]  # by path and peft's name


def adapter_tensors(net: nn.Module) -> Tensors:
    """Returns the tensors of a network with adapters, by the path of their layer and peft's name."""
    found: Tensors = {}
    for key, x in net.state_dict().items():
        if match := _KEY.fullmatch(key):
            found.setdefault(match[1], {})[match[2]] = x
    return found


def write_lora(
    path: Path,
    net: Any,
    config: AdapterConfig,
    layers: Mapping[str, Layer],
    metadata: Mapping[str, Any],
    part: str = "prior",
    for_others: bool = True,
) -> None:
    """Writes the adapters of `attach` with the names that ComfyUI's LoRA loaders read, and beside them `for_others`.

    These are a file for diffusers' pipeline of a prior (LoRA and DoRA), or else a folder for peft, without the text
    encoder; there is none of v1's Stage B, which no other program has. The tensors include alpha / rank, since not
    every reader supports alpha (diffusers' `load_lora_adapter` does not) and all take a missing alpha for the rank.
    """
    tensors = {
        at: {name: x * layers[at].scale if name in _SCALED else x for name, x in one.items()}
        for at, one in adapter_tensors(net).items()
    }
    header = adapter_header(part, metadata, release_of(net.params), kind="lora")
    state, renamed = {}, {}
    for at, one in tensors.items():
        name = layers[at].name
        if part != "prior":
            name = name.replace(TEXT, f"text_encoders.{COMFYUI_CLIPS['decoder']}.transformer.text_model.")
        for key, x in one.items():
            is_norm = key == "lora_magnitude_vector"  # [out], of a convolution [1, out, 1, 1]
            state[f"{name}.{_COMFYUI.get(key, key)}"] = x.view(-1, *[1] * max(1, x.ndim - 1)) if is_norm else x
            renamed[f"{name.replace(NETWORK_PREFIX, 'prior.')}.{_DIFFUSERS.get(key, key)}"] = x
    write_tensors(path, state, header)
    if not for_others or part == "token_decoder":
        return
    if part == "prior" and config.kind in LINEAR:
        write_tensors(path.with_name(DIFFUSERS_FILE), renamed, header)
    else:
        _write_peft(path.with_name("peft"), config, layers, tensors, header)


def _write_peft(
    folder: Path, config: AdapterConfig, layers: Mapping[str, Layer], tensors: Tensors, header: Mapping[str, str]
) -> None:
    """Writes a network's adapters as the files that `peft.PeftModel.from_pretrained` reads."""
    layers = {at: replace(x, alpha=float(x.rank)) for at, x in layers.items() if x.name.startswith(NETWORK_PREFIX)}
    if not layers:
        return
    folder.mkdir(exist_ok=True)
    state = {
        f"{PEFT_PREFIX}{at}.{_DIFFUSERS.get(key, key)}": x
        for at, one in tensors.items()
        if at in layers
        for key, x in one.items()
    }
    write_tensors(folder / PEFT_FILE, state, header)
    settings = peft_config(replace(config, alpha=0.0, rslora=False), layers).to_dict()
    text = json.dumps({**settings, "inference_mode": True}, default=sorted, indent=2)
    write_text(folder / PEFT_CONFIG, text)


@torch.no_grad()
def load_adapters(net: nn.Module, config: AdapterConfig, layers: Mapping[str, Layer]) -> None:
    """Gives the adapters of `attach` the values in the file `config.start`; layers that it lacks keep theirs.

    ValueError, naming the file, if it has other layers, another kind or other ranks.
    """
    lora = read_lora(config.start)
    found = {f"{NETWORK_PREFIX}{path}": x for path, x in lora.network.items()}
    found |= {f"{TEXT}{path}": x for path, x in lora.text.items()}
    wrong = [*lora.unknown, *keys_of({name: x for name, x in found.items() if name not in _names(layers)})]
    if wrong:
        raise ValueError(
            f"[lora] start: {config.start} changes layers that targets and text_targets do not name "
            f"({listed(wrong, most=1, width=60)}): name them too, or start from another file"
        )
    for at, tensors in adapter_tensors(net).items():
        if layers[at].name in found:
            _load(tensors, found[layers[at].name], config, layers[at])


def _names(layers: Mapping[str, Layer]) -> set[str]:
    return {layer.name for layer in layers.values()}


def _load(tensors: dict[str, Tensor], adapter: Adapter, config: AdapterConfig, layer: Layer) -> None:
    values = dict(adapter.tensors)
    alpha, rank = values.pop("alpha", None), rank_of(adapter.tensors)
    where = f"[lora] start: {config.start} has, for {layer.name},"
    if values.keys() != {_READ.get(name, name) for name in tensors}:
        raise ValueError(
            f"{where} {', '.join(values)}, which is no {config.kind} like that of this training "
            f"({', '.join(_READ.get(name, name) for name in tensors)}): set kind, rank and factor as it was trained"
        )
    scale = (1.0 if alpha is None or rank is None else float(alpha) / rank) / layer.scale
    for name, x in tensors.items():
        value = values[_READ.get(name, name)]
        if name == "lora_magnitude_vector" and len(value) == x.numel():
            value = value.view(x.shape)
        if value.shape != x.shape:
            shapes = " and not ".join("x".join(map(str, one.shape)) for one in (value, x))
            ranks = f" (rank {rank}; here it is {layer.rank})" if rank is not None and rank != layer.rank else ""
            raise ValueError(f"{where} a factor of {shapes}{ranks}: set rank and factor as it was trained")
        x.copy_(value * scale if name in _SCALED else value)
