"""`train`: train one stage, or compute first what others of its networks make of the pictures."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

STAGES = ("text", "encoder", "vqgan", "decoder", "token-decoder", "prior", "lora")
CACHE = "cache"


def add(commands: Any) -> None:
    """Add the command to a parser's commands."""
    parser = commands.add_parser("train", help="train one stage")
    smaller = "choose a smaller batch, such as --set train.batch=8, or cache.batch=2 for a cache"
    parser.set_defaults(run=_run, requirements="requirements-train.txt", smaller=smaller)
    parser.add_argument("stage", metavar="STAGE", choices=(*STAGES, CACHE), help=f"{', '.join(STAGES)}; or {CACHE}")
    parser.add_argument("--config", type=Path, required=True, metavar="FILE.toml")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change one value of the file")


def _run(options: argparse.Namespace) -> None:
    if options.stage == CACHE:
        from ..training.data.build_cache import make_cache

        make_cache(options.config, options.set)
        return
    from ..training.run import run

    run(options.stage, options.config, options.set)
