"""Where the networks run and in which precision, when the user leaves it open."""

from __future__ import annotations

import torch

# Dtypes that weights can have, by name. In the order of ComfyUI's choices: append new ones.
WEIGHT_DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
# Those that networks compute in; fp8 is for storage.
DTYPES = {name: dtype for name, dtype in WEIGHT_DTYPES.items() if dtype.itemsize > 1}
# Measured on a CPU with AVX512-BF16: bf16 makes the released prior 2.4 times as fast and the shipped small model no
# faster, so that it may as well paint the same picture everywhere.
LARGE_MODEL = 100_000_000  # parameters


def pick_device(device: str | torch.device = "auto") -> torch.device:
    """The device asked for; "auto" is the GPU (CUDA or ROCm, XPU, MPS) if there is one, else the CPU."""
    counts = {
        "cuda": torch.cuda.device_count(),
        "xpu": _count_xpus(),
        "mps": int(torch.backends.mps.is_available()),
        "cpu": 1,
    }
    present = [kind for kind, count in counts.items() if count]
    if device == "auto":
        return torch.device(present[0])
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device {str(device)!r} is unknown: choose auto, {', '.join(present)}") from None
    if (chosen.index or 0) >= counts.get(chosen.type, 0):
        raise ValueError(f"device {str(device)!r} is not on this machine: choose auto, {', '.join(present)}")
    return chosen


def pick_dtype(dtype: str | torch.dtype, device: torch.device, parameters: int) -> torch.dtype:
    """The dtype asked for; "auto" is bf16 if the processor computes it natively and the model is large, else fp32."""
    if dtype == "auto":
        large = parameters >= LARGE_MODEL
        return torch.bfloat16 if large and native_bf16(device) else torch.float32
    chosen = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if chosen is None or chosen not in DTYPES.values():
        raise ValueError(f"dtype {str(dtype)!r} is unknown: choose auto, {', '.join(DTYPES)}")
    return chosen


def native_bf16(device: torch.device) -> bool:
    """Whether the processor has bf16 arithmetic of its own."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)  # Ampere
    if device.type == "cpu":
        # Private in torch, and no public name exists: a torch without them means fp32.
        checks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
        return any(getattr(torch.cpu, check, bool)() for check in checks)
    return device.type == "xpu"


def _count_xpus() -> int:
    xpu = getattr(torch, "xpu", None)  # torch 2.4
    return 0 if xpu is None else xpu.device_count()
