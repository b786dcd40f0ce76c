"""Merges LoRAs into the networks of a model, changes their strengths, and takes them off again."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, MutableMapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..common.text import listed
from .adapters import Adapters, Fit, fit, keys_of, merge_lora
from .components import TEXT_ENCODER, TOWERS, State
from .fingerprint import fingerprint
from .key_maps import COMFYUI_CLIPS, pack_attention, split_attention, text_from_transformers, text_to_transformers
from .lora_files import Lora, log_ignored, read_lora
from .lora_folders import STEMS
from .shipped import SHIPPED, given_path

AnyPath = str | os.PathLike[str]
Loras = Mapping[AnyPath, float]  # strength by file
Networks = MutableMapping[str, Any]  # by part name

_CLIPS = dict(zip(COMFYUI_CLIPS.values(), TOWERS, strict=True))


@dataclass
class _Merged:
    strength: float
    parts: dict[str, Adapters]
    file: str
    weights: str  # its fingerprint


class LoraStack:
    """The LoRAs that are merged into a model's networks, in the order in which they were added.

    Methods change the mapping `networks` by part name: of two parts that share a network, a changed one gets its own.
    """

    def __init__(self) -> None:
        self._loras: dict[str, _Merged] = {}
        # By part, the network and its tensors before any LoRA. A network that was copied has no changed tensors.
        self._originals: dict[str, tuple[nn.Module, State]] = {}

    @property
    def strengths(self) -> dict[str, float]:
        """The strength of each LoRA, by name."""
        return {name: lora.strength for name, lora in self._loras.items()}

    def records(self) -> list[dict[str, Any]]:
        """Returns the file, its fingerprint, the strength and the stage of each LoRA in use, for metadata."""
        return [
            {"file": one.file, "weights": one.weights, "strength": one.strength, "stage": _stage_name(one.parts)}
            for one in self._loras.values()
            if one.strength
        ]

    def add(
        self, networks: Networks, source: AnyPath, strength: float = 1.0, name: str | None = None
    ) -> tuple[str, Lora]:
        """Merges a LoRA into the stage that it fits and its text tower; returns its name (default: the file's) and it.

        Logs one line about the keys that are not applied. Raises ValueError, without changing anything, if the file
        cannot be read or fits neither, or the name is in use.
        """
        path = given_path(source)
        file = str(source) if source in SHIPPED else path.name
        strength = _number(strength, name or file)
        if name in self._loras:
            raise ValueError(f"a LoRA named {name!r} is loaded already: choose another name, or unload it")
        lora = read_lora(path)
        parts = {_stage_of(networks, lora): lora.network, _CLIPS[lora.clip]: lora.text}
        fits = {part: _fit(networks, part, adapters, file, lora) for part, adapters in parts.items() if adapters}
        log_ignored(file, lora, fits.values())
        name = name or self._free_name(path.absolute().parent.name if path.stem in STEMS else Path(file).stem)
        self._loras[name] = _Merged(
            strength, {part: found.fitting for part, found in fits.items()}, file, fingerprint(source)
        )
        self._merge(networks, fits)
        return name, lora

    def set_strength(self, networks: Networks, name: str, strength: float) -> None:
        """Changes a LoRA's strength. Raises ValueError if it is no number, or no LoRA has this name."""
        lora = self._find(name)
        lora.strength = _number(strength, name)
        self._merge(networks, lora.parts)

    def remove(self, networks: Networks, name: str) -> None:
        """Takes a LoRA off: without any other, the weights are exactly those before. Raises ValueError as above."""
        self._find(name)
        self._merge(networks, self._loras.pop(name).parts)

    def _find(self, name: str) -> _Merged:
        if name not in self._loras:
            raise ValueError(f"no LoRA is named {name!r}: loaded are {', '.join(self._loras) or 'none'}")
        return self._loras[name]

    def _free_name(self, stem: str) -> str:
        names = (stem, *(f"{stem}-{i}" for i in range(2, len(self._loras) + 3)))
        return next(name for name in names if name not in self._loras)

    @torch.no_grad()
    def _merge(self, networks: Networks, parts: Mapping[str, Any]) -> None:
        """Restores networks and merges all LoRAs into them."""
        for part in parts:
            if part in self._originals:
                self._restore(networks, part)
            if self._changes(part):
                self._change(networks, part)

    def _changes(self, part: str) -> list[tuple[Adapters, float]]:
        """Returns the adapters of a part and their strengths; [] if no LoRA changes it."""
        changes = [(lora.parts[part], lora.strength) for lora in self._loras.values() if part in lora.parts]
        return changes if any(strength for _, strength in changes) else []

    def _restore(self, networks: Networks, part: str) -> None:
        changed, (network, tensors) = networks[part], self._originals.pop(part)
        if changed is network:  # which may have been moved or cast since
            network.load_state_dict(_like(network.state_dict(), tensors), strict=False, assign=True)
        networks[part] = network

    def _change(self, networks: Networks, part: str) -> None:
        network = networks[part]
        others = [*(x for name, x in networks.items() if name != part), *(x for x, _ in self._originals.values())]
        is_shared = any(other is network for other in others)
        before = network.state_dict()
        is_outline = all(x.is_meta for x in before.values())  # its weights are read later, see `apply`
        changed = {} if is_outline else self._merged(before, part)
        kept = [name for key in changed for name in (key, f"{key}_scale") if name in before]
        self._originals[part] = network, {} if is_shared else {key: before[key] for key in kept}
        if is_shared:
            network = networks[part] = deepcopy(network)
        network.load_state_dict(changed, strict=False, assign=True)

    @torch.no_grad()
    def apply(self, network: nn.Module, part: str) -> None:
        """Merges all LoRAs into a network that was just read."""
        if self._changes(part):
            network.load_state_dict(self._merged(network.state_dict(), part), strict=False, assign=True)

    def _merged(self, before: State, part: str) -> State:
        """Returns the tensors of a part that its LoRAs change."""
        merged = _with_separate_projections(part, before)
        pack = text_from_transformers if part in TOWERS else dict if merged.keys() == before.keys() else pack_attention
        for adapters, strength in self._changes(part):
            merged = merge_lora(merged, adapters, strength)
        after = pack(merged)
        return {
            key: x
            for key, x in after.items()
            if x is not before[key] and (x.dtype != before[key].dtype or not torch.equal(x, before[key]))
        }


def _like(now: State, tensors: State) -> State:
    """Returns a network's earlier tensors in the form that it has now: on its device, in its dtype, int8 or not."""
    if not all(key in now or key.endswith("_scale") for key in tensors):
        tensors = split_attention(tensors)  # int8 splits packed projections
    out = {}
    for key, x in tensors.items():
        if key not in now:
            continue
        if x.dtype == torch.int8 != now[key].dtype:
            x = x.float() * tensors[f"{key}_scale"]
        is_weight = now[key].dtype == torch.int8 != x.dtype  # which loading quantises
        out[key] = x.to(now[key].device, None if is_weight else now[key].dtype)
    return out


def _number(strength: float, name: str) -> float:
    try:
        number = float(strength)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"the strength of {name} must be a number such as 0.8, got {strength!r}")
    return number


def _stage_name(parts: Mapping[str, Adapters]) -> str:
    """Returns the stage that a LoRA changes; if only its text tower, the tower's."""
    return next((part for part in parts if part not in TOWERS), next(iter(parts)).removesuffix(f"_{TEXT_ENCODER}"))


def _stage_of(networks: Mapping[str, nn.Module | None], lora: Lora) -> str:
    """Returns the stage that most adapters of a LoRA fit: the prior if none fits."""
    counts = {
        name: len(fit(lora.network, _shapes(name, network.state_dict())).fitting)
        for name in ("prior", "decoder", "token_decoder")
        if (network := networks.get(name)) is not None
    }
    return max(counts, key=lambda name: counts[name]) if any(counts.values()) else "prior"


def _with_separate_projections(part: str, state: State) -> State:
    """Returns a part's tensors under the names that LoRA files use."""
    if part in TOWERS:
        return text_to_transformers(state)
    return split_attention(state) if part == "token_decoder" else state


def _shapes(part: str, state: State) -> dict[str, torch.Size]:
    return {key: x.shape for key, x in _with_separate_projections(part, state).items()}


def _fit(networks: Networks, part: str, adapters: Adapters, name: str, lora: Lora) -> Fit:
    """Returns the adapters that fit a part. Raises ValueError if none does, or the model lacks the part."""
    network: nn.Module | None = networks.get(part)
    title = part.replace("_", " ")
    if network is None:
        raise ValueError(f"{name} changes the {title}, which this model lacks: load a complete model")
    found = fit(adapters, _shapes(part, network.state_dict()))
    if not found.fitting:
        keys = keys_of(adapters)
        reason = found.example or f"such as {listed(keys, most=1, width=100)}"
        raise ValueError(
            f"none of the {len(keys)} keys of {name} fits this {title} ({reason}; it seems to be for {lora.family()}): "
            "use a LoRA for this model"
        )
    return found
