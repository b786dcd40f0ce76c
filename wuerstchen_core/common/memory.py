"""Lack of memory."""

from __future__ import annotations

_ERRORS = ("DefaultCPUAllocator", "MemoryError")  # torch's, and Python's or NumPy's that a worker of torch passes on


def is_out_of_memory(error: BaseException) -> bool:
    """True if an error is for lack of memory, also in a worker that reads training data."""
    if isinstance(error, MemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("out of memory" in text.lower() or any(x in text for x in _ERRORS))
