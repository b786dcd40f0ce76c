"""The table of dtypes; chooses a device and a dtype."""

from __future__ import annotations

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

# Models with fewer parameters use fp32, in which every processor computes the same picture. On a CPU with AVX512-BF16,
# bf16 makes the released prior 2.4 times as fast and the small shipped model no faster.
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


def pick_dtype(dtype: str | torch.dtype, device: torch.device, parameters: int) -> torch.dtype:
    """Returns a dtype; "auto" is bf16 for a large model on a processor with native bf16, otherwise fp32.

    Raises ValueError if the dtype is not one of NETWORK_DTYPES.
    """
    if dtype == "auto":
        return companion_dtype(device) if parameters >= LARGE_MODEL else torch.float32
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
        # Private to torch, with no public equivalent; where they are missing, fp32 is used.
        checks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
        return any(getattr(torch.cpu, check, bool)() for check in checks)
    return device.type == "xpu"
