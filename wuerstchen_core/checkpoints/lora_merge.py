"""Merges LoRA files into the networks of a model."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..common.text import listed
from .adapters import Adapters, Fit, fit, keys_of, merge_lora
from .components import TOWERS, State
from .key_maps import COMFYUI_CLIPS, text_from_transformers, text_to_transformers
from .lora_files import Lora, log_ignored, read_lora

Loras = Mapping[str | os.PathLike[str], float]  # strength by file

_CLIPS = dict(zip(COMFYUI_CLIPS.values(), TOWERS, strict=True))


def merge_loras(networks: dict[str, Any], loras: Loras) -> None:
    """Merges LoRA files into the stage that each fits, and its text tower. Networks that two parts share are replaced.

    Logs one line about the keys that are not applied; raises ValueError if nothing fits the stage or the text tower.
    """
    for file, strength in loras.items():
        name, lora = Path(file).name, read_lora(file)
        if not math.isfinite(strength):
            raise ValueError(f"the strength of {name} must be a number such as 0.8, got {strength}")
        parts = ((_stage_of(networks, lora), lora.network), (_CLIPS[lora.clip], lora.text))
        fits = [_merge(networks, part, adapters, strength, name, lora) for part, adapters in parts if adapters]
        log_ignored(name, lora, fits)


def _stage_of(networks: Mapping[str, nn.Module | None], lora: Lora) -> str:
    """Returns the stage that most adapters of a LoRA fit: the prior if none fits."""
    counts = {
        name: len(fit(lora.network, _shapes(network.state_dict())).fitting)
        for name in ("prior", "decoder", "token_decoder")
        if (network := networks.get(name)) is not None
    }
    return max(counts, key=lambda name: counts[name]) if any(counts.values()) else "prior"


def _shapes(state: State) -> dict[str, torch.Size]:
    return {key: x.shape for key, x in state.items()}


def _merge(networks: dict[str, Any], part: str, adapters: Adapters, strength: float, name: str, lora: Lora) -> Fit:
    network: nn.Module | None = networks.get(part)
    title, is_tower = part.replace("_", " "), part in TOWERS
    if network is None:
        raise ValueError(f"{name} changes the {title}, which this model lacks: load a complete model")
    state = text_to_transformers(network.state_dict()) if is_tower else network.state_dict()
    found = fit(adapters, _shapes(state))
    if not found.fitting:
        keys = keys_of(adapters)
        reason = found.example or f"such as {listed(keys, most=1, width=100)}"
        raise ValueError(
            f"none of the {len(keys)} keys of {name} fits this {title} ({reason}; it seems to be for {lora.family()}): "
            "use a LoRA for this model"
        )
    merged = merge_lora(state, found.fitting, strength)
    if any(other is network for key, other in networks.items() if key != part):  # the decoder keeps the unchanged tower
        network = networks[part] = deepcopy(network)
    network.load_state_dict(text_from_transformers(merged) if is_tower else merged, assign=True)
    return found
