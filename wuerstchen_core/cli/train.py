"""`train`: trains one stage, or computes the latent cache for it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..common.versions import OLDEST_FOR_TRAINING, check_versions

STAGES = ("text", "encoder", "vqgan", "decoder", "token-decoder", "prior", "lora")
CACHE = "cache"
INSTALL_HINT = '`pip install "wuerstchen[train]"` or, in the pack\'s folder, `pip install -r requirements-train.txt`'
MEMORY_HINT = "choose a smaller batch, such as --set train.batch=8, or cache.batch=2 for a cache"


def add(commands: Any) -> None:
    """Adds the command to the parser's commands."""
    parser = commands.add_parser("train", help="train one stage")
    parser.set_defaults(run=_run, install_hint=INSTALL_HINT, memory_hint=MEMORY_HINT)
    text = f"{', '.join(STAGES)}; or {CACHE}, which encodes a dataset for later training runs"
    parser.add_argument("stage", metavar="STAGE", choices=(*STAGES, CACHE), help=text)
    parser.add_argument("--config", type=Path, required=True, metavar="FILE.toml", help="training configuration")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a value; repeatable")


def _run(options: argparse.Namespace) -> None:
    check_versions(OLDEST_FOR_TRAINING)
    from ..training.data.build_cache import make_cache
    from ..training.run import run

    if options.stage == CACHE:
        make_cache(options.config, options.set)
    else:
        run(options.stage, options.config, options.set)
