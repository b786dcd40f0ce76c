"""Lack of memory."""

from __future__ import annotations


def is_out_of_memory(error: BaseException) -> bool:
    """True if torch raised an error for lack of memory."""
    text = str(error)
    return isinstance(error, RuntimeError) and ("out of memory" in text.lower() or "DefaultCPUAllocator" in text)
