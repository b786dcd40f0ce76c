"""Adapters (LoRA, LoHa, LoKr) of a LoRA file: the change that each makes to a weight, and merging it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..common.text import listed
from .components import State


@dataclass
class Adapter:
    """The tensors that change one module's weight, by ComfyUI's names, and their keys in the file."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    keys: list[str] = field(default_factory=list)


Adapters = dict[str, Adapter]  # by module path

# The tensors of each supported kind: LoRA, LoHa and LoKr, whose two factors may be products themselves.
_KINDS = (
    {"lora_up.weight", "lora_down.weight"},
    {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"},
    {"lokr_w1", "lokr_w2"},
    {"lokr_w1", "lokr_w2_a", "lokr_w2_b"},
    {"lokr_w1_a", "lokr_w1_b", "lokr_w2"},
    {"lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b"},
)


def is_complete(adapter: Adapter) -> bool:
    """True if the tensors are exactly those of a LoRA, LoHa or LoKr, with or without DoRA's magnitudes."""
    return set(adapter.tensors) - {"alpha", "dora_scale"} in _KINDS


def keys_of(adapters: Adapters) -> list[str]:
    """Returns the adapters' keys in the file."""
    return [key for adapter in adapters.values() for key in adapter.keys]


def delta(tensors: Mapping[str, Tensor]) -> Tensor:
    """Returns the change [out, in * ...] that an adapter adds to a weight [out, in, ...] at strength 1.

    DoRA's magnitudes are not applied. Raises an error if the factors do not fit each other; `fit` sorts these out.
    """
    rank: int | None = None
    if "lora_up.weight" in tensors:
        up, down = (tensors[name].flatten(1) for name in ("lora_up.weight", "lora_down.weight"))
        out, rank = up.mm(down), down.shape[0]
    elif "hada_w1_a" in tensors:
        one, two = (tensors[f"hada_{name}_a"].mm(tensors[f"hada_{name}_b"]) for name in ("w1", "w2"))
        if one.shape != two.shape:  # they would be broadcast
            raise ValueError(f"the products of a LoHa's factors are {list(one.shape)} and {list(two.shape)}")
        out, rank = one * two, tensors["hada_w1_b"].shape[0]
    else:
        factors = []
        for name in ("lokr_w1", "lokr_w2"):
            if name in tensors:
                factors.append(tensors[name].flatten(1))
            else:
                factors.append(tensors[f"{name}_a"].mm(tensors[f"{name}_b"]))
                rank = tensors[f"{name}_b"].shape[0]
        out = torch.kron(*factors)
    if rank is not None and "alpha" in tensors:
        out = out * (tensors["alpha"].reshape(()) / rank)
    return out


@dataclass(frozen=True)
class Fit:
    """A file's adapters by their match in a network: a weight of their shape, no module, a weight of another shape.

    `example` describes the first adapter in `misshaped`.
    """

    fitting: Adapters
    absent: Adapters
    misshaped: Adapters
    example: str = ""


def fit(adapters: Adapters, shapes: Mapping[str, Sequence[int]]) -> Fit:
    """Compares adapters with the shapes of a network's weights, by module path."""
    fitting: Adapters = {}
    absent: Adapters = {}
    misshaped: Adapters = {}
    example = ""
    for path, adapter in adapters.items():
        if path not in shapes:
            absent[path] = adapter
        elif _fits(adapter.tensors, shapes[path]):
            fitting[path] = adapter
        else:
            misshaped[path] = adapter
            change = _delta_shape(adapter.tensors)
            text = "has factors that do not fit each other" if change is None else f"is {_shape_text(change)}"
            example = example or f"{path}: the weight is {_shape_text(shapes[path])}, its change {text}"
    return Fit(fitting, absent, misshaped, example)


def _shape_text(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _delta_shape(tensors: Mapping[str, Tensor]) -> torch.Size | None:
    """Returns the shape of an adapter's delta; None if its factors do not fit each other."""
    try:
        return delta({name: x.to("meta", torch.float32) for name, x in tensors.items()}).shape
    except (RuntimeError, IndexError, ValueError):
        return None


def _fits(tensors: Mapping[str, Tensor], shape: Sequence[int]) -> bool:
    change = _delta_shape(tensors)
    if change is None or math.prod(change) != math.prod(shape):
        return False
    one_row = change[0] == 1 and len(shape) == 4  # OneTrainer's depthwise convolutions
    if change[0] != shape[0] and not one_row:
        return False
    scale, ones = tensors.get("dora_scale"), [1] * (len(shape) - 2)
    return scale is None or list(scale.shape) in ([shape[0], 1, *ones], [1, shape[1], *ones])


def merge_lora(state: State, adapters: Adapters, strength: float = 1.0) -> State:
    """Returns a network's weights with adapters added, computed in fp32 and rounded to each weight's dtype.

    Raises ValueError if an adapter has no weight of its shape in `state`, or has DoRA's magnitudes.
    """
    weights = {key.removesuffix(".weight"): x for key, x in state.items() if key.endswith(".weight")}
    found = fit(adapters, {path: x.shape for path, x in weights.items()})
    if unmatched := [*keys_of(found.absent), *keys_of(found.misshaped)]:
        reason = f"; {found.example}" if found.example else ""
        raise ValueError(f"no weight for {listed(unmatched, most=1, width=100)}{reason}")
    merged = dict(state)
    for path, adapter in found.fitting.items():
        if "dora_scale" in adapter.tensors:
            raise ValueError(f"{path} uses DoRA, which cannot be merged here: load the LoRA in ComfyUI")
        weight = weights[path]
        change = delta({name: x.float() for name, x in adapter.tensors.items()}).to(weight.device)
        merged[f"{path}.weight"] = (weight.float() + strength * change.reshape(weight.shape)).to(weight.dtype)
    return merged
