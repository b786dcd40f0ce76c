"""Commands of this package as one types them."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

PACKAGE = __package__.partition(".")[0]


def program() -> str:
    """Returns how the command line of this package was started: by its script, or as a module."""
    return "wuerstchen" if Path(sys.argv[0]).stem == "wuerstchen" else f"python -m {PACKAGE}"


def command(arguments: Sequence[str]) -> str:
    """Returns the command with these arguments, quoted for this system's shell."""
    joined = subprocess.list2cmdline(arguments) if os.name == "nt" else shlex.join(arguments)
    return f"{program()} {joined}"
