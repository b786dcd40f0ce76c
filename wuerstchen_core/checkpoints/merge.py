"""LoRA files into networks, for as long as these live."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from torch import nn

from .adapters import Adapters, fit, keys_of, merge_lora
from .components import State, listed
from .key_maps import text_from_transformers, text_to_transformers
from .lora_files import Lora, read_lora

Loras = Mapping[str | os.PathLike[str], float]  # strengths by file
TOWER = "prior_text_encoder"  # whose LoRAs are trained with the prior's


def merge_loras(networks: dict[str, Any], loras: Loras) -> None:
    """Add LoRA files to the prior and to its text tower among `networks`, which may be exchanged.

    ValueError if a file, or a part of it, was made for other networks.
    """
    for file, strength in loras.items():
        name, lora = Path(file).name, read_lora(file)
        if not math.isfinite(strength):
            raise ValueError(f"the strength of {name} must be a number such as 0.8, got {strength}")
        if lora.unknown:
            raise ValueError(
                f"{len(lora.unknown)} keys of {name} are no LoRA's that is understood ({listed(lora.unknown)}): "
                "LoRA, LoHa and LoKr files are"
            )
        for part, adapters in (("prior", lora.network), (TOWER, lora.text)):
            if adapters:
                _merge(networks, part, adapters, strength, name, lora)


def _merge(networks: dict[str, Any], part: str, adapters: Adapters, strength: float, name: str, lora: Lora) -> None:
    network: nn.Module | None = networks.get(part)
    if network is None:
        raise ValueError(f"{name} changes the {part.replace('_', ' ')}, which this model has not: load a complete one")
    state = network.state_dict()
    if part == TOWER:
        state = text_to_transformers(state)
    found = fit(adapters, {key.removesuffix(".weight"): x.shape for key, x in state.items() if key.endswith(".weight")})
    left = [*keys_of(found.absent), *keys_of(found.misshaped)]
    if left:
        why = found.example or f"it looks made for {lora.family()}"
        raise ValueError(
            f"{len(left)} keys of {name} fit nothing in this {part.replace('_', ' ')} ({left[0]}; {why}): "
            "take a LoRA made for this model"
        )
    merged: State = merge_lora(state, adapters, strength)
    if part == TOWER:
        merged = text_from_transformers(merged)
    if any(other is network for key, other in networks.items() if key != part):  # the decoder's, too: that one stays
        network = networks[part] = deepcopy(network)
    network.load_state_dict(merged, assign=True)
