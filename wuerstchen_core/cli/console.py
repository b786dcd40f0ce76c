"""Standard output and error that work in every console and pipe."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

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
            _discard(sys.stdout)
            if isinstance(error, BrokenPipeError):
                raise SystemExit(READER_GONE) from None
            error.filename = "stdout"
            raise


def write_error(message: str) -> None:
    """Writes a line to stderr, if that is possible."""
    try:
        sys.stderr.write(f"{message}\n")
    except OSError:
        _discard(sys.stderr)


def _discard(stream: TextIO) -> None:
    """Discards what could not be written. Otherwise Python would fail again when it flushes the stream at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
