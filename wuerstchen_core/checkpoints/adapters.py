"""What a LoRA file holds for each module, and what that adds to the module's weight."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .components import State, listed


@dataclass
class Adapter:
    """What changes one module's weight: its tensors under ComfyUI's names, and the file's keys for them."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    keys: list[str] = field(default_factory=list)


Adapters = dict[str, Adapter]  # by module path

# The tensors of the kinds that are known: LoRA, LoHa, and LoKr, whose two factors may be products themselves.
_KINDS = (
    {"lora_up.weight", "lora_down.weight"},
    {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"},
    {"lokr_w1", "lokr_w2"},
    {"lokr_w1", "lokr_w2_a", "lokr_w2_b"},
    {"lokr_w1_a", "lokr_w1_b", "lokr_w2"},
    {"lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b"},
)


def is_complete(adapter: Adapter) -> bool:
    """Whether its tensors are those of a LoRA, LoHa or LoKr (DoRA's magnitudes may be there), no less and no more."""
    return set(adapter.tensors) - {"alpha", "dora_scale"} in _KINDS


def keys_of(adapters: Adapters) -> list[str]:
    """The file's keys for adapters."""
    return [key for adapter in adapters.values() for key in adapter.keys]


def delta(tensors: Mapping[str, Tensor]) -> Tensor:
    """What an adapter without magnitudes adds to a weight [out, in, ...] at strength 1: [out, in * ...].

    Its factors have to fit one another (see `fit`).
    """
    rank: int | None = None
    if "lora_up.weight" in tensors:
        up, down = (tensors[name].flatten(1) for name in ("lora_up.weight", "lora_down.weight"))
        out, rank = up @ down, down.shape[0]
    elif "hada_w1_a" in tensors:
        one, two = (tensors[f"hada_{name}_a"] @ tensors[f"hada_{name}_b"] for name in ("w1", "w2"))
        out, rank = one * two, tensors["hada_w1_b"].shape[0]
    else:
        factors = []
        for name in ("lokr_w1", "lokr_w2"):
            if name in tensors:
                factors.append(tensors[name].flatten(1))
            else:
                factors.append(tensors[f"{name}_a"] @ tensors[f"{name}_b"])
                rank = tensors[f"{name}_b"].shape[0]
        out = torch.kron(*factors)
    if rank is not None and "alpha" in tensors:
        out = out * (tensors["alpha"].reshape(()) / rank)
    return out


@dataclass(frozen=True)
class Fit:
    """Adapters sorted by what they find in a network: a weight of their shape, none, or one of another shape."""

    fitting: Adapters
    absent: Adapters
    misshaped: Adapters
    example: str = ""  # the first wrong shape, in words


def fit(adapters: Adapters, shapes: Mapping[str, Sequence[int]]) -> Fit:
    """Compare adapters with the shapes of a network's weights by module path."""
    found: tuple[Adapters, Adapters, Adapters] = ({}, {}, {})
    example = ""
    for path, adapter in adapters.items():
        shape = shapes.get(path)
        if shape is None:
            found[1][path] = adapter
        elif _fits(adapter.tensors, shape):
            found[0][path] = adapter
        else:
            found[2][path] = adapter
            example = example or f"{path}'s weight is {'x'.join(map(str, shape))}, its change {_words(adapter.tensors)}"
    return Fit(*found, example)


def _change(tensors: Mapping[str, Tensor]) -> tuple[int, int] | None:
    """The shape of an adapter's delta, computed without its numbers; None if its factors do not fit one another."""
    sizes = {name: (x.shape[0], x.shape[1:].numel()) for name, x in tensors.items() if x.ndim >= 2}

    def product(left: str, right: str) -> tuple[int, int] | None:
        if left not in sizes or right not in sizes or sizes[left][1] != sizes[right][0]:
            return None
        return sizes[left][0], sizes[right][1]

    if "lora_up.weight" in tensors:
        return product("lora_up.weight", "lora_down.weight")
    kind = "hada" if "hada_w1_a" in tensors else "lokr"
    one, two = (sizes.get(name) or product(f"{name}_a", f"{name}_b") for name in (f"{kind}_w1", f"{kind}_w2"))
    if one is None or two is None:
        return None
    if kind == "hada":
        return one if one == two else None
    return one[0] * two[0], one[1] * two[1]


def _words(tensors: Mapping[str, Tensor]) -> str:
    change = _change(tensors)
    return "made of factors that differ in rank" if change is None else "x".join(map(str, change))


def _fits(tensors: Mapping[str, Tensor], shape: Sequence[int]) -> bool:
    change = _change(tensors)
    if change is None or math.prod(change) != math.prod(shape):
        return False
    if change[0] != shape[0] and (change[0] != 1 or len(shape) != 4):  # OneTrainer counts a depthwise one's rows as 1
        return False
    scale, ones = tensors.get("dora_scale"), [1] * (len(shape) - 2)
    return scale is None or list(scale.shape) in ([shape[0], 1, *ones], [1, shape[1], *ones])


def merge_lora(state: State, adapters: Adapters, strength: float = 1.0) -> State:
    """A network's weights with adapters added, computed in fp32 and rounded to the weights' own dtype.

    ValueError if one has no weight of its shape in `state`, or has DoRA's magnitudes.
    """
    weights = {key.removesuffix(".weight"): x for key, x in state.items() if key.endswith(".weight")}
    found = fit(adapters, {path: x.shape for path, x in weights.items()})
    if found.absent or found.misshaped:
        left = [*keys_of(found.absent), *keys_of(found.misshaped)]
        raise ValueError(
            f"{len(left)} keys of this LoRA fit nothing in this network ({listed(left)}): "
            f"take one for a model of its sizes"
        )
    merged = dict(state)
    for path, adapter in found.fitting.items():
        if "dora_scale" in adapter.tensors:
            raise ValueError(f"{path} has DoRA's magnitudes, which are not merged: load the file in ComfyUI")
        weight = weights[path]
        change = delta({name: x.float() for name, x in adapter.tensors.items()}).to(weight.device)
        merged[f"{path}.weight"] = (weight.float() + strength * change.reshape(weight.shape)).to(weight.dtype)
    return merged
