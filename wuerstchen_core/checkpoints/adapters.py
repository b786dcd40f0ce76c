"""Adapters of a LoRA file (LoRA, LoHa, LoKr, OFT, differences): what each does to a weight, and merging it."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..common.text import listed
from .components import State


@dataclass
class Adapter:
    """The tensors that change one module's weight and bias, by ComfyUI's names, and their keys in the file."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    keys: list[str] = field(default_factory=list)


Adapters = dict[str, Adapter]  # by module path, or by the path of a parameter such as GRN's gamma

_LORA = {"lora_up.weight", "lora_down.weight"}
_LOHA = {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}
_FACTORS = (  # adapters of low rank, whose change can have DoRA's magnitudes; mid, t1 and t2 are Tucker cores
    _LORA,
    _LORA | {"lora_mid.weight"},
    _LOHA,
    _LOHA | {"hada_t1", "hada_t2"},
    {"lokr_w1", "lokr_w2"},
    {"lokr_w1", "lokr_w2_a", "lokr_w2_b"},
    {"lokr_w1_a", "lokr_w1_b", "lokr_w2"},
    {"lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b"},
)
_RANKS = ("lora_down.weight", "hada_w1_b", "lokr_w2_b", "lokr_w1_b")  # factors with the rank as their first size
_OTHERS = ({"oft_blocks"}, {"diff"}, {"set_weight"})


def is_complete(adapter: Adapter) -> bool:
    """True if the tensors are exactly those of a supported adapter of a weight, a bias's difference, or both."""
    names = set(adapter.tensors) - {"alpha", "diff_b"}
    if "oft_blocks" in names and adapter.tensors["oft_blocks"].ndim != 3:  # BOFT
        return False
    return names - {"dora_scale"} in _FACTORS or names in _OTHERS or (not names and "diff_b" in adapter.tensors)


def keys_of(adapters: Adapters) -> list[str]:
    """Returns the adapters' keys in the file."""
    return [key for adapter in adapters.values() for key in adapter.keys]


def rank_of(tensors: Mapping[str, Tensor]) -> int | None:
    """Returns the rank by which alpha is divided; None without factors of low rank."""
    return next((tensors[name].shape[0] for name in _RANKS if name in tensors), None)


def delta(tensors: Mapping[str, Tensor]) -> Tensor:
    """Returns the change [out, in * ...] that factors add to a weight [out, in, ...] at strength 1.

    DoRA's magnitudes are not applied. Raises an error if the factors do not fit each other; `fit` sorts these out.
    """
    rank = rank_of(tensors)
    if "lora_up.weight" in tensors:
        up, down = (tensors[name].flatten(1) for name in ("lora_up.weight", "lora_down.weight"))
        mid = tensors.get("lora_mid.weight")
        out = up.mm(down) if mid is None else tucker(up.T, down, mid)
    elif "hada_w1_a" in tensors:
        one, two = (_hada_product(tensors, i) for i in (1, 2))
        if one.shape != two.shape:  # they would be broadcast
            raise ValueError(f"the products of a LoHa's factors are {list(one.shape)} and {list(two.shape)}")
        out = one * two
    else:
        factors = (
            tensors[name].flatten(1) if name in tensors else tensors[f"{name}_a"].mm(tensors[f"{name}_b"])
            for name in ("lokr_w1", "lokr_w2")
        )
        out = torch.kron(*factors)
    if rank is not None and "alpha" in tensors:
        out = out * (tensors["alpha"].reshape(()) / rank)
    return out


def _hada_product(tensors: Mapping[str, Tensor], i: int) -> Tensor:
    """Returns one of the two products [out, in * ...] that a LoHa multiplies."""
    a, b, core = tensors[f"hada_w{i}_a"], tensors[f"hada_w{i}_b"], tensors.get(f"hada_t{i}")
    return a.mm(b) if core is None else tucker(a, b, core)


def tucker(a: Tensor, b: Tensor, core: Tensor) -> Tensor:
    """Returns [out, in * ...] from a [r, out], b [s, in] and core [r, s, ...]."""
    return torch.einsum("rs...,ro,si->oi...", core, a, b).flatten(1)


def changed_weight(weight: Tensor, tensors: Mapping[str, Tensor], strength: float) -> Tensor:
    """Returns an fp32 weight [out, in, ...] with an adapter's change to it.

    DoRA's magnitudes are the norms of the changed weight's rows or columns, as in peft. `set_weight` ignores the
    strength. As in ComfyUI, the strength of OFT counts twice.
    """
    if "set_weight" in tensors:
        return tensors["set_weight"]
    if "oft_blocks" in tensors:
        blocks, strength = weight.unflatten(0, tensors["oft_blocks"].shape[:2]), strength**2
        change = torch.einsum("knm,kn...->km...", _rotation(tensors), blocks).flatten(0, 1) - weight
    else:
        change = (tensors["diff"] if "diff" in tensors else delta(tensors)).reshape(weight.shape)
    if "dora_scale" in tensors:
        changed = weight + change
        change = changed * (tensors["dora_scale"] / _norm(changed, tensors["dora_scale"])) - weight
    return weight + strength * change


def _rotation(tensors: Mapping[str, Tensor]) -> Tensor:
    """Returns OFT's orthogonal blocks [n, b, b]: Cayley's transform of skew matrices, whose norm alpha limits."""
    blocks = tensors["oft_blocks"]
    skew, limit = blocks - blocks.mT, float(tensors.get("alpha", 0))
    norm = skew.norm() + 1e-8
    if 0 < limit < norm:
        skew = skew * (limit / norm)
    eye = torch.eye(blocks.shape[-1], device=blocks.device)
    return (eye + skew) @ torch.linalg.inv(eye - skew)


def _norm(weight: Tensor, dora_scale: Tensor) -> Tensor:
    """Returns the norms of a weight's rows, or of its columns if `dora_scale` has one number per column."""
    axis = 0 if dora_scale.shape[0] == weight.shape[0] else 1
    return torch.linalg.vector_norm(weight, dim=[i for i in range(weight.ndim) if i != axis], keepdim=True)


def comfyui_dora_scale(weight: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """Returns magnitudes that have the effect of `changed_weight` in ComfyUI's formula, for an fp32 weight.

    ComfyUI divides rows by the norms of the unchanged weight, and columns by those of the changed one.
    """
    scale = tensors["dora_scale"]
    if scale.shape[0] != weight.shape[0]:
        return scale
    return scale * _norm(weight, scale) / _norm(weight + delta(tensors).reshape(weight.shape), scale)


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
    """Compares adapters with the shapes of a network's parameters, by key."""
    fitting: Adapters = {}
    absent: Adapters = {}
    misshaped: Adapters = {}
    example = ""
    for path, adapter in adapters.items():
        changes = changes_by_key(path, adapter, shapes)
        wrong = [key for key, tensors in changes.items() if key in shapes and not _fits(tensors, shapes[key])]
        if not changes.keys() <= shapes.keys():
            absent[path] = adapter
        elif not wrong:
            fitting[path] = adapter
        else:
            misshaped[path] = adapter
            change = _change_shape(changes[wrong[0]])
            text = "has factors that do not fit each other" if change is None else f"is {_shape_text(change)}"
            example = example or f"{wrong[0]}: it is {_shape_text(shapes[wrong[0]])}, its change {text}"
    return Fit(fitting, absent, misshaped, example)


def changes_by_key(path: str, adapter: Adapter, keys: Container[str]) -> dict[str, dict[str, Tensor]]:
    """Returns an adapter's tensors by the key of the parameter that they change; `keys` are the network's."""
    weight = {name: x for name, x in adapter.tensors.items() if name != "diff_b"}
    changes = {path if path in keys else f"{path}.weight": weight} if weight.keys() - {"alpha"} else {}
    if "diff_b" in adapter.tensors:
        changes[f"{path}.bias"] = {"diff": adapter.tensors["diff_b"]}
    return changes


def _shape_text(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _change_shape(tensors: Mapping[str, Tensor]) -> torch.Size | None:
    """Returns the shape of an adapter's change, or OFT's number of rows; None if its factors do not fit each other."""
    if "oft_blocks" in tensors:
        count, size, width = tensors["oft_blocks"].shape
        return torch.Size([count * size]) if size == width else None
    for name in ("diff", "set_weight"):
        if name in tensors:
            return tensors[name].shape
    try:
        return delta({name: x.to("meta", torch.float32) for name, x in tensors.items()}).shape
    except (RuntimeError, IndexError, ValueError):
        return None


def _fits(tensors: Mapping[str, Tensor], shape: Sequence[int]) -> bool:
    change = _change_shape(tensors)
    if "oft_blocks" in tensors:
        return change is not None and change[0] == shape[0]
    if change is None or math.prod(change) != math.prod(shape):
        return False
    if "diff" in tensors or "set_weight" in tensors:
        return list(change) == list(shape)
    one_row = change[0] == 1 and len(shape) == 4  # OneTrainer's depthwise convolutions
    if change[0] != shape[0] and not one_row:
        return False
    scale, ones = tensors.get("dora_scale"), [1] * (len(shape) - 2)
    return scale is None or (len(shape) > 1 and list(scale.shape) in ([shape[0], 1, *ones], [1, shape[1], *ones]))


def merge_lora(state: State, adapters: Adapters, strength: float = 1.0) -> State:
    """Returns a network's weights with adapters merged, computed in fp32 and rounded to each weight's dtype.

    Weights in int8, which have a scale beside them, become fp32; loading them quantises them anew.
    Raises ValueError if an adapter has no parameter of its shape in `state`. Strength 0 changes nothing.
    """
    found = fit(adapters, {key: x.shape for key, x in state.items()})
    if unmatched := [*keys_of(found.absent), *keys_of(found.misshaped)]:
        reason = f"; {found.example}" if found.example else ""
        raise ValueError(f"no weight for {listed(unmatched, most=1, width=100)}{reason}")
    merged = dict(state)
    for path, adapter in found.fitting.items() if strength else ():
        for key, tensors in changes_by_key(path, adapter, state).items():
            weight = merged[key]
            change = {name: x.to(weight.device, torch.float32) for name, x in tensors.items()}
            before = weight.float()
            if weight.dtype == torch.int8:
                before *= state[f"{key}_scale"]
            dtype = torch.float32 if weight.dtype == torch.int8 else weight.dtype
            merged[key] = changed_weight(before, change, strength).to(dtype)
    return merged
