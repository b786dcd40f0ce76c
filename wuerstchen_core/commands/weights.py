"""`inspect`: what a weight file holds."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any


def add(commands: Any) -> None:
    """Add the command to a parser's commands."""
    inspect = commands.add_parser("inspect", help="say what a weight file holds")
    inspect.set_defaults(run=_inspect, requirements="requirements.txt", smaller="close other programs")
    inspect.add_argument("file", metavar="FILE", help='weight file, diffusers folder, or "demo"')
    inspect.add_argument("--json", action="store_true")


def _inspect(options: argparse.Namespace) -> None:
    from ..checkpoints.inspect import describe

    description = describe(options.file)
    text = json.dumps(description.as_dict(), ensure_ascii=False) if options.json else "\n".join(description.lines())
    sys.stdout.write(f"{text}\n")
