"""What a table was measured on."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from pathlib import Path
from typing import Any

import torch

CPU = Path("/proc/cpuinfo")
PEERS = ("diffusers", "transformers", "accelerate")


def machine(device: Any, threads: int) -> dict[str, Any]:
    """The machine and the packages."""
    kind = torch.device(device).type
    return {
        "device": torch.cuda.get_device_name(device) if kind == "cuda" else kind,
        "processor": _processor(),
        "threads": threads or torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": {"torch": torch.__version__}
        | {name: importlib.metadata.version(name) for name in PEERS if importlib.util.find_spec(name) is not None},
    }


def _processor() -> str:
    if CPU.exists():
        for line in CPU.read_text("utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
