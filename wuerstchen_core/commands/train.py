"""`train`: train one stage."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

STAGES = ("text", "encoder", "vqgan", "decoder", "token-decoder", "prior", "lora")


def add(commands: Any) -> None:
    """Add the command to a parser's commands."""
    parser = commands.add_parser("train", help="train one stage")
    smaller = "choose a smaller batch, such as --set train.batch=8"
    parser.set_defaults(run=_run, requirements="requirements-train.txt", smaller=smaller)
    parser.add_argument("stage", metavar="STAGE", choices=STAGES, help=", ".join(STAGES))
    parser.add_argument("--config", type=Path, required=True, metavar="FILE.toml")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change one value of the file")


def _run(options: argparse.Namespace) -> None:
    from ..training.run import run

    run(options.stage, options.config, options.set)
