"""Finds the networks in a state dict: their keys may be behind prefixes such as `module.` or `model.diffusion_model.`.

A network's marks show it and its prefix, so any prefix is understood, also one per network as in a training save.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..common.text import listed
from .components import COMPONENTS, TEXT_ENCODER
from .dequant import quantising_program
from .key_maps import foreign

logger = logging.getLogger(__name__)

# Modules that torch puts around others: compiled, sharded, with recomputed activations.
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_COUNTERS = {"decay", "num_updates", "initted", "step"}  # of averages, beside their networks
_EMA = re.compile(r"(?<![a-z])(?<!non_)ema(?![a-z])|average", re.IGNORECASE)


class Found(NamedTuple):
    """A network in a file: the dotted key of its state dict, the prefix of its keys there, and its tensors."""

    kind: str
    label: str
    prefix: str
    state: dict[str, Any]

    @property
    def path(self) -> str:
        """The label and the prefix as one; "" for a bare state dict."""
        return ".".join(filter(None, (self.label, self.prefix))).removesuffix(".")

    @property
    def is_ema(self) -> bool:
        return bool(_EMA.search(self.path))


def unwrapped(state: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a state dict without the names of torch's wrappers in its keys."""
    return {_WRAPPERS.sub("", key): x for key, x in state.items()}


def find_networks(label: str, state: Mapping[str, Any]) -> list[Found]:
    """Returns the networks whose marks are in a state dict. Keys outside of all prefixes are of no network."""
    kinds = _prefixes(state)
    states: dict[str, dict[str, Any]] = {prefix: {} for prefix in kinds}
    longest_first = sorted(kinds, key=len, reverse=True)
    for key, x in state.items():
        prefix = next((prefix for prefix in longest_first if key.startswith(prefix)), None)
        if prefix is not None and not (key.removeprefix(prefix) in _COUNTERS and _EMA.search(prefix)):
            states[prefix][key.removeprefix(prefix)] = x
    return [Found(kind, label, prefix, _averaged(state, prefix, states[prefix])) for prefix, kind in kinds.items()]


def _prefixes(keys: Iterable[str]) -> dict[str, str]:
    """Returns the kinds of networks by the prefix of their keys, in the order of the keys."""
    found = {}
    marks = [(mark, kind) for kind, entry in COMPONENTS.items() for mark in entry.marks]
    marks.sort(key=lambda item: len(item[0]), reverse=True)  # a text tower's long marks end with its short ones
    for key in keys:
        for mark, kind in marks:
            if key == mark or key.endswith(f".{mark}"):
                found[key.removesuffix(mark)] = kind
                break
    return found


def _averaged(state: Mapping[str, Any], prefix: str, own: dict[str, Any]) -> dict[str, Any]:
    """Returns the moving average of a network where latent diffusion's trainer stores it: `model_ema.` and no dots."""
    parts = prefix.split(".")[:-1]
    for end in range(1, len(parts) + 1):
        start = f"{'.'.join(parts[:end])}_ema.{''.join(parts[end:])}"
        names = {key: start + key.replace(".", "") for key in own}
        if any(name in state for name in names.values()):
            return {key: state.get(name, own[key]) for key, name in names.items()}
    return own


def choose(path: Path, found: Collection[Found]) -> list[Found]:
    """Returns one network of each kind, and of text towers up to two; averaged weights precede others.

    Logs a line about a choice between equals.
    """
    chosen = []
    for kind in COMPONENTS:
        same = sorted((one for one in found if one.kind == kind), key=lambda one: not one.is_ema)
        best = [one for one in same if one.is_ema == same[0].is_ema]
        count = 2 if kind == TEXT_ENCODER else 1
        if len(best) > count:
            names = [one.path or "no prefix" for one in best]
            logger.warning(
                f"{path} holds {len(best)} networks of the kind {kind} ({listed(names)}): {names[0]} is used"
            )
        chosen += best[:count]
    return chosen


def name_unknown(state: Mapping[str, Any]) -> str:
    """Returns what a state dict without any of the networks is, as far as its keys tell."""
    prefix = os.path.commonprefix(list(state)).rpartition(".")[0]
    keys = [key.removeprefix(f"{prefix}.") if prefix else key for key in state]
    if program := quantising_program(keys):
        return f"weights quantised by {program}, which is not supported"
    return foreign(state) or foreign(keys) or f"unknown weights (first keys: {listed(list(state)) or 'none'})"
