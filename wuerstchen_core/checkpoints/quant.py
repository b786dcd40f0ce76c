"""Stores weights in another dtype, or in fp8 with one scale for each large tensor.

fp8 is for storage only: torch cannot add in it. As in ComfyUI's files, `X.weight` in e4m3 is to be multiplied by
`X.scale_weight`, one fp32 number. Our scales are powers of two, so dequantizing is exact in every dtype.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..common.devices import WEIGHT_DTYPES
from .lazy import LazyTensor

FP8 = WEIGHT_DTYPES["fp8"]
SCALED_MARK = "scaled_fp8"  # an empty tensor by which ComfyUI recognises such a file
LARGE = 4096  # elements; smaller tensors, such as norms and biases, save nothing and stay exact
SCALE_SUFFIX = "scale_weight"
_CHUNK = 1 << 22  # elements converted to fp32 at a time
# e4m3's largest number is 448, and 464 is the largest that rounds to it. Half of 464 rounds to more than half of 448,
# so that weights which were rounded once get the same scale again.
_ROUNDS_TO_LARGEST = 464.0


def scale_key(key: str) -> str:
    """Returns the key of a weight's scale."""
    return f"{key.removesuffix('weight')}{SCALE_SUFFIX}"


def is_large(key: str, x: Tensor | LazyTensor) -> bool:
    """True for tensors that fp8 applies to: matrices, embeddings and convolution weights.

    Not the codebook, whose exact numbers become the image, nor depthwise convolutions (9 numbers per channel).
    """
    shape = torch.Size(x.shape)
    deep = len(shape) >= 2 and shape[1:].numel() > 9
    return key.endswith("weight") and "codebook" not in key and deep and shape.numel() >= LARGE


def quantize(key: str, tensor: Tensor | LazyTensor, dtype: torch.dtype | None) -> dict[str, LazyTensor]:
    """Returns the entries that store a tensor in `dtype` (None: unchanged): with fp8, a large one has a scale as well.

    With fp8, small tensors are stored in bf16. Loading raises ValueError if a number does not fit.
    """
    x = LazyTensor.of(tensor)
    if dtype == FP8 and not is_large(key, x):
        dtype = torch.bfloat16 if x.dtype.itemsize > 2 else None
    if dtype is None or not x.dtype.is_floating_point or x.dtype == dtype:
        return {key: x}
    if dtype != FP8:
        return {key: LazyTensor(x.shape, dtype, lambda: _cast(key, x.load(), dtype))}
    return {
        key: LazyTensor(x.shape, FP8, lambda: _to_fp8(key, x.load())),
        scale_key(key): LazyTensor((), torch.float32, lambda: torch.tensor(_scale(key, x.load()))),
    }


def _cast(key: str, x: Tensor, dtype: torch.dtype) -> Tensor:
    out = x.to(dtype)
    if dtype == torch.float16 and bool(out.isinf().any()):
        raise ValueError(f"{key} holds {x.abs().max():.3g}, more than fp16's largest number 65504: use bf16 or fp32")
    return out


def _to_fp8(key: str, x: Tensor) -> Tensor:
    scale, end = _scale(key, x), torch.finfo(FP8).max  # some versions of torch give NaN beyond it
    out = torch.empty(x.shape, dtype=FP8)
    rows = max(1, _CHUNK // x[0].numel())
    for source, target in zip(x.split(rows), out.split(rows), strict=True):
        target.copy_((source.float() / scale).clamp_(-end, end))
    return out


def _scale(key: str, x: Tensor) -> float:
    """Returns the smallest power of two that brings the largest number into e4m3's range, before and after rounding."""
    low, high = x.aminmax()  # not abs(), which copies the tensor
    largest = float(torch.maximum(-low, high))
    if not math.isfinite(largest):
        raise ValueError(f"{key} holds {largest}, which fp8 cannot store: use undamaged weights, or another dtype")
    return 2.0 ** math.ceil(math.log2(largest / _ROUNDS_TO_LARGEST)) if largest else 1.0
