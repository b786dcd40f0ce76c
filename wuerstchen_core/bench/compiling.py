"""Whether torch can compile here."""

from __future__ import annotations

from typing import Any

import torch


def can_compile(device: Any) -> bool:
    """Try it on next to nothing: what it needs (a C++ compiler, Triton) differs with the device and the system."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(8, device=device))
    except RuntimeError:  # all that torch's compiler raises is one
        return False
    return True
