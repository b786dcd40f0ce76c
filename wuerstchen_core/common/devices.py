"""The table of dtypes; chooses a device and a dtype."""

from __future__ import annotations

from functools import cache

import torch

# Dtypes for stored weights, by name. The nodes list them in this order: append new ones.
WEIGHT_DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
    "int8": torch.int8,
}
# Dtypes of tensors in computations; fp8 is for storage only.
DTYPES = {name: dtype for name, dtype in WEIGHT_DTYPES.items() if dtype.itemsize > 1}
# Dtypes of networks. In int8, linear layers have int8 weights; the rest has the dtype of `companion_dtype`.
NETWORK_DTYPES = {**DTYPES, "int8": torch.int8}

# Models with fewer parameters use fp32, in which every processor computes the same picture: int8 would save a seventh
# of the small shipped model's time.
LARGE_MODEL = 100_000_000


def pick_device(device: str | torch.device = "auto") -> torch.device:
    """Returns a device; "auto" is the GPU (CUDA or ROCm, XPU, MPS) if there is one, otherwise the CPU.

    Raises ValueError if the device is unknown or not on this machine.
    """
    counts = {
        "cuda": torch.cuda.device_count(),
        "xpu": torch.xpu.device_count() if hasattr(torch, "xpu") else 0,  # since torch 2.4
        "mps": int(torch.backends.mps.is_available()),
        "cpu": 1,
    }
    present = [kind for kind, count in counts.items() if count]
    if device == "auto":
        return torch.device(present[0])
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"device {str(device)!r} is unknown: choose auto, {', '.join(present)}") from None
    if (chosen.index or 0) >= counts.get(chosen.type, 0):
        raise ValueError(f"device {str(device)!r} is not on this machine: choose auto, {', '.join(present)}")
    return chosen


def pick_dtype(
    dtype: str | torch.dtype, device: torch.device, parameters: int, *, allow_int8: bool = True
) -> torch.dtype:
    """Returns a dtype; "auto" is the one in which a large model was measured to be fastest, and fp32 for a small model.

    That is int8 on CPUs of `prefers_int8` if `allow_int8`, else bf16 if it is native, else fp32. Raises ValueError if
    the dtype is not one of NETWORK_DTYPES.
    """
    if dtype == "auto":
        if parameters < LARGE_MODEL:
            return torch.float32
        return torch.int8 if allow_int8 and prefers_int8(device) else companion_dtype(device)
    chosen = NETWORK_DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if chosen is None or chosen not in NETWORK_DTYPES.values():
        raise ValueError(f"dtype {str(dtype)!r} is unknown: choose auto, {', '.join(NETWORK_DTYPES)}")
    return chosen


def companion_dtype(device: torch.device) -> torch.dtype:
    """Returns an int8 network's dtype of everything but linear layers: bf16 if it is native, otherwise fp32."""
    return torch.bfloat16 if native_bf16(device) else torch.float32


def native_bf16(device: torch.device) -> bool:
    """True if the device has bf16 arithmetic."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)  # Ampere
    if device.type == "cpu":
        return _cpu_has("amx_tile") or _cpu_has("avx512_bf16")
    return device.type == "xpu"


def prefers_int8(device: torch.device) -> bool:
    """True if int8 was measured to be faster than bf16 and fp32: on CPUs with AVX512-VNNI and without AMX."""
    return device.type == "cpu" and has_int8() and _cpu_has("vnni") and not _cpu_has("amx_tile")


@cache
def has_int8() -> bool:
    """True if the processor has instructions for dot products of int8, and torch has the operators that use them.

    Without these instructions oneDNN adds pairs of products in 16 bits, where they overflow.
    """
    operators = (hasattr(torch.ops.onednn, f"qlinear_{name}") for name in ("prepack", "pointwise"))
    if not all(operators) or not torch.backends.mkldnn.is_available():
        return False
    found: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return _cpu_has("vnni") or any(found.get(name) for name in ("avx512_vnni", "avx_vnni", "amx_int8"))


def _cpu_has(name: str) -> bool:
    """True if torch finds instructions; "vnni" are those of AVX512. Private to torch, with no public equivalent."""
    return bool(getattr(torch.cpu, f"_is_{name}_supported", bool)())
