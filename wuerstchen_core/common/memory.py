"""Lack of memory."""

from __future__ import annotations


def is_out_of_memory(error: BaseException) -> bool:
    """True if torch raised an error for lack of memory."""
    return isinstance(error, RuntimeError) and any(
        mark in str(error) for mark in ("out of memory", "DefaultCPUAllocator")
    )
