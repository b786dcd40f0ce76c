"""Standard output and error that work in every console and pipe."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

READER_GONE = 141  # the exit code that a shell gives to a process that writes to a closed pipe


def prepare_streams() -> None:
    """Makes stdout and stderr escape characters that their encoding lacks, and discard text if they are closed."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the caller, or a process without a console
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@contextmanager
def flushed_stdout() -> Iterator[None]:
    """Flushes stdout at the end. Exits without a message if its reader has closed the pipe, as in `... | head`."""
    try:
        yield
    finally:
        try:
            sys.stdout.flush()
        except OSError as error:
            # Without this, Python would fail again when it flushes at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            if isinstance(error, BrokenPipeError):
                raise SystemExit(READER_GONE) from None
            raise
