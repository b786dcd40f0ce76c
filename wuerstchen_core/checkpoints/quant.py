"""Stores weights in another dtype, or large matrices in fp8 or int8 as ComfyUI stores them.

Beside `X.weight` are `X.weight_scale`, by which it is multiplied, and `X.comfy_quant`, a JSON text as bytes:

- fp8: e4m3 and one scale, a power of two, with which dequantizing is exact in every dtype;
- int8: one scale for each row [out, 1], after ConvRot. Clipping the largest numbers of the shipped models' rows reduced
  the error by less than 0.2 %, so the scale is that of the largest number.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..common.devices import WEIGHT_DTYPES
from ..common.int8 import quantize_rows
from .convrot import largest_group, rotate
from .lazy import LazyTensor, Quantised

FP8 = WEIGHT_DTYPES["fp8"]
INT8 = torch.int8
FORMATS = {"float8_e4m3fn": FP8, "float8_e5m2": torch.float8_e5m2, "int8_tensorwise": INT8}  # by ComfyUI's names
CONFIG = "comfy_quant"
SCALE = "weight_scale"

SMALLEST = 4096  # elements; smaller tensors save nothing and stay exact
NARROWEST = 32  # inputs; those of narrower layers are latents, which 8 bits would change most
_CHUNK = 1 << 18  # elements converted at a time, in fp32 as many as fit into a cache
# e4m3's largest number is 448, and 464 is the largest that rounds to it. Half of 464 rounds to more than half of 448,
# so that weights which were rounded once get the same scale again.
_ROUNDS_TO_LARGEST = 464.0


def is_matrix(key: str, x: Tensor | LazyTensor) -> bool:
    """True for tensors that fp8 and int8 apply to: large weights of linear layers and embeddings.

    Not convolutions, whose layers in ComfyUI ignore scales, nor the codebook, whose exact numbers become the image.
    """
    shape = torch.Size(x.shape)
    large = len(shape) == 2 and shape[1] >= NARROWEST and shape.numel() >= SMALLEST
    return large and key.endswith("weight") and "codebook" not in key


def quantize(key: str, tensor: Tensor | LazyTensor, dtype: torch.dtype | None) -> dict[str, LazyTensor]:
    """Returns the entries that store a tensor in `dtype`; None: as it is stored already.

    With fp8 and int8, all but large matrices is stored in bf16. Weights that are stored in this dtype already are not
    quantised again. Loading raises ValueError if a number does not fit.
    """
    x = LazyTensor.of(tensor)
    if x.quantised is not None and (dtype is None or (dtype == x.quantised.numbers.dtype and is_matrix(key, x))):
        return _entries(key, x.quantised)
    if dtype in (FP8, INT8) and is_matrix(key, x):
        return _entries(key, _fp8(key, x) if dtype == FP8 else _int8(key, x))
    if dtype in (FP8, INT8):
        dtype = torch.bfloat16 if x.dtype.itemsize != 2 else None
    if dtype is None or not x.dtype.is_floating_point or x.dtype == dtype:
        return {key: x}
    return {key: LazyTensor(x.shape, dtype, lambda: _cast(key, x.load(), dtype))}


def layer_state(x: LazyTensor) -> dict[str, Tensor]:
    """Returns the weight for a layer in int8: with its scales, if it is stored in int8 as the layer holds it.

    That is a scale for each row, and not rotated.
    """
    stored = x.quantised
    if stored is None or not _is_int8_of_rows(stored, rotated=False):
        return {"weight": x.load()}
    return {"weight": stored.numbers.load(), SCALE: stored.scale.load().float()}


def int8_entries(key: str, tensor: Tensor | LazyTensor, rotated: bool) -> dict[str, Tensor]:
    """Returns the entries that store a weight [out, in] in int8 with a scale for each row, for layers of ComfyUI.

    Numbers that are stored in this form already are kept.
    """
    x = LazyTensor.of(tensor)
    stored = x.quantised
    if stored is None or not _is_int8_of_rows(stored, rotated):
        group = largest_group(x.shape[1]) if rotated else 0
        numbers, scale = (LazyTensor.of(part) for part in _to_int8(key, x.load(), group))
        stored = Quantised(numbers, scale, _int8_config(group))
    entries = {name: entry.load() for name, entry in _entries(key, stored).items()}
    return {name: x.float() if x.is_floating_point() else x for name, x in entries.items()}


def _entries(key: str, weight: Quantised) -> dict[str, LazyTensor]:
    """Returns the three tensors of a quantised weight."""
    stem, text = key.removesuffix("weight"), json.dumps(weight.config).encode()
    config = LazyTensor((len(text),), torch.uint8, lambda: torch.frombuffer(bytearray(text), dtype=torch.uint8))
    return {key: weight.numbers, f"{stem}{SCALE}": weight.scale, f"{stem}{CONFIG}": config}


def _cast(key: str, x: Tensor, dtype: torch.dtype) -> Tensor:
    out = x.to(dtype)
    if dtype == torch.float16 and bool(out.isinf().any()):
        raise ValueError(f"{key} holds {x.abs().max():.3g}, more than fp16's largest number 65504: use bf16 or fp32")
    return out


def _fp8(key: str, x: LazyTensor) -> Quantised:
    return Quantised(
        LazyTensor(x.shape, FP8, lambda: _to_fp8(key, x.load())),
        LazyTensor((), torch.float32, lambda: torch.tensor(_fp8_scale(key, x.load()))),
        {"format": "float8_e4m3fn"},
    )


def _to_fp8(key: str, x: Tensor) -> Tensor:
    scale, end = _fp8_scale(key, x), torch.finfo(FP8).max  # some versions of torch give NaN beyond it
    out = torch.empty(x.shape, dtype=FP8)
    for source, target in chunks(x, out):
        target.copy_((source.float() / scale).clamp_(-end, end))
    return out


def _fp8_scale(key: str, x: Tensor) -> float:
    """Returns the smallest power of two that brings the largest number into e4m3's range, before and after rounding."""
    low, high = x.float().aminmax() if x.dtype.itemsize == 1 else x.aminmax()  # not abs(), which copies the tensor
    largest = float(torch.maximum(-low, high))
    _check_finite(key, largest, "fp8")
    return 2.0 ** math.ceil(math.log2(largest / _ROUNDS_TO_LARGEST)) if largest else 1.0


def _int8(key: str, x: LazyTensor) -> Quantised:
    group = largest_group(x.shape[1])
    return Quantised(
        LazyTensor(x.shape, INT8, lambda: _to_int8(key, x.load(), group)[0]),
        LazyTensor((x.shape[0], 1), torch.float32, lambda: _to_int8(key, x.load(), group)[1]),
        _int8_config(group),
    )


def _int8_config(group: int) -> dict[str, Any]:
    return {"format": "int8_tensorwise"} | ({"convrot": True, "convrot_groupsize": group} if group else {})


def convrot_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a layer's configuration with the options that some files nest under `params`."""
    nested = config.get("params")
    return {**(nested if isinstance(nested, dict) else {}), **config}


def _is_int8_of_rows(weight: Quantised, rotated: bool) -> bool:
    """True if a weight is in int8 with a scale for each row, and rotated or not."""
    is_rotated = bool(convrot_options(weight.config).get("convrot"))
    in_rows = weight.config["format"] == "int8_tensorwise" and weight.scale.shape == (weight.numbers.shape[0], 1)
    return in_rows and is_rotated == rotated


def _to_int8(key: str, x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Returns a weight [out, in] in int8, rotated in groups of `group` (0: not), and its scales [out, 1] in fp32.

    Raises ValueError that names `key` if a number is not finite.
    """
    out, scales = torch.empty(x.shape, dtype=INT8), torch.empty(x.shape[0], 1)
    for source, target, scale in chunks(x, out, scales):
        rotated = rotate(source.float(), group)
        _check_finite(key, float(rotated.abs().max()), "int8")
        for out_part, part in zip((target, scale), quantize_rows(rotated), strict=True):
            out_part.copy_(part)
    return out, scales


def chunks(x: Tensor, *others: Tensor) -> Any:
    """Returns the same few rows of each tensor at a time."""
    rows = max(1, _CHUNK * len(x) // max(1, x.numel()))
    return zip(*(each.split(rows) for each in (x, *others)), strict=True)


def _check_finite(key: str, largest: float, dtype: str) -> None:
    if not math.isfinite(largest):
        raise ValueError(f"{key} holds {largest}, which {dtype} cannot store: use undamaged weights, or another dtype")
