"""In which dtype a weight is stored: the file's own, another, or fp8 with a scale for each large tensor.

fp8 is for storage alone: torch does not add in it. The names are ComfyUI's: beside `X.weight` in e4m3 stands
`X.scale_weight`, one fp32 number by which it is multiplied. Our scales are powers of two, so that nothing is lost on
the way back, whatever the dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from ..common.devices import WEIGHT_DTYPES
from .lazy import AnyTensor, Planned, as_it_is, derived

FP8 = WEIGHT_DTYPES["fp8"]
SCALED_MARK = "scaled_fp8"  # an empty tensor by which ComfyUI knows such a file
LARGE = 4096  # numbers: what is smaller takes no room and, as norms and biases are, is read exactly
_SUFFIX = "scale_weight"
_AT_ONCE = 1 << 22  # numbers that are widened at a time
# What rounds to 448, the largest of e4m3. Half of it is the least that rounds to more than half of 448, so that numbers
# which were rounded once get the same scale again.
_ROUNDS_TO_LARGEST = 464.0


def scale_key(key: str) -> str:
    """Where the scale of a weight stands."""
    return f"{key.removesuffix('weight')}{_SUFFIX}"


def is_large(key: str, x: Tensor | Planned) -> bool:
    """Whether a tensor is a matrix, a table of embeddings or a convolution's weight that fp8 is meant for.

    The codebook is none (pictures are made of its very numbers), nor are depthwise convolutions (9 numbers a channel).
    """
    shape = torch.Size(x.shape)
    deep = len(shape) >= 2 and shape[1:].numel() > 9
    return key.endswith("weight") and "codebook" not in key and deep and shape.numel() >= LARGE


def planned(key: str, x: Tensor | Planned, dtype: torch.dtype | None) -> dict[str, Planned]:
    """What is written for a tensor in `dtype` (None: its own): itself, and with a large one in fp8 its scale."""
    given = as_it_is(x) if isinstance(x, Tensor) else x
    if dtype is None or not given.dtype.is_floating_point or given.dtype == dtype:
        return {key: given}
    if dtype != FP8:
        return {key: Planned(given.shape, dtype, lambda: _cast(key, given.make(), dtype))}
    if not is_large(key, given):
        return planned(key, given, torch.bfloat16 if given.dtype.itemsize > 2 else None)
    return {
        key: Planned(given.shape, FP8, lambda: _to_fp8(key, given.make())),
        scale_key(key): Planned((), torch.float32, lambda: torch.tensor(_scale(key, given.make()))),
    }


def _cast(key: str, x: Tensor, dtype: torch.dtype) -> Tensor:
    out = x.to(dtype)
    if dtype == torch.float16 and bool(out.isinf().any()):
        raise ValueError(f"{key} holds {x.abs().max():.3g}, and fp16 ends at 65504: choose bf16 or fp32 for it")
    return out


def _to_fp8(key: str, x: Tensor) -> Tensor:
    scale, end = _scale(key, x), torch.finfo(FP8).max  # beyond which some versions of torch give NaN
    out = torch.empty(x.shape, dtype=FP8)
    rows = max(1, _AT_ONCE // x[0].numel())
    for given, made in zip(x.split(rows), out.split(rows), strict=True):
        made.copy_((given.float() / scale).clamp_(-end, end))
    return out


def _scale(key: str, x: Tensor) -> float:
    """The smallest power of two that brings the largest number into what e4m3 can hold, before and after rounding."""
    low, high = x.aminmax()  # and not abs(), which is as large as the tensor
    largest = float(torch.maximum(-low, high))
    if not math.isfinite(largest):
        raise ValueError(f"{key} holds {largest}, which fp8 can't: these weights are damaged, or choose another dtype")
    return 2.0 ** math.ceil(math.log2(largest / _ROUNDS_TO_LARGEST)) if largest else 1.0


def is_scaled(keys: Iterable[str]) -> bool:
    """Whether the weights of these keys are stored in fp8 with scales."""
    return any(key.endswith(_SUFFIX) for key in keys)


def dequantised(state: dict[str, AnyTensor]) -> dict[str, AnyTensor]:
    """Weights with their scales worked in, in the dtype of the others; tensors without data only lose the scales."""
    if not is_scaled(state):
        return state
    dtype = _others(state)
    out: dict[str, AnyTensor] = {}
    for key, x in state.items():
        if key.endswith(_SUFFIX) or key.rpartition(".")[2] == SCALED_MARK:
            continue
        scale = state.get(scale_key(key)) if key.endswith("weight") else None
        out[key] = x if scale is None or x.is_meta else derived(x.shape, dtype, _scaled_to(dtype), x, scale)
    return out


def widened(state: dict[str, AnyTensor]) -> dict[str, AnyTensor]:
    """Weights with those in fp8 in the dtype of the others."""
    state = dequantised(state)
    dtype = _others(state)
    return {
        key: derived(x.shape, dtype, lambda stored: stored.to(dtype), x) if x.dtype == FP8 and not x.is_meta else x
        for key, x in state.items()
    }


def _scaled_to(dtype: torch.dtype) -> Callable[[Tensor, Tensor], Tensor]:
    """What works a scale into a tensor, in fp32 and in place."""
    return lambda x, scale: x.to(torch.float32, copy=True).mul_(scale.float()).to(dtype)


def _others(state: Mapping[str, Tensor | Planned]) -> torch.dtype:
    """The widest dtype among what is no fp8 and no scale; bf16 if there is nothing else."""
    found = {x.dtype for key, x in state.items() if x.dtype.is_floating_point and not key.endswith(_SUFFIX)}
    wide = [dtype for dtype in (torch.float32, torch.float16, torch.bfloat16) if dtype in found]
    return wide[0] if wide else torch.bfloat16
