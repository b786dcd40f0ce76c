"""Checks of error messages."""

from __future__ import annotations


def check_error(message: str, *facts: str) -> None:
    """Asserts that an error is one short line that names all `facts`."""
    assert message and "\n" not in message and len(message) < 300, message
    assert all(fact in message for fact in facts), f"{facts} not all in: {message}"
