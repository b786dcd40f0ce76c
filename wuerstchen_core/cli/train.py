"""`train`: trains one stage, or computes the latent cache for it."""

from __future__ import annotations

import argparse
import json
import sys
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
    parser.add_argument("--config", type=Path, metavar="FILE.toml", help="training configuration")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a value; repeatable")
    parser.add_argument("--keys", action="store_true", help="list the configuration's keys, with defaults and meanings")
    parser.add_argument("--json", action="store_true", help="with --keys: print a JSON schema, for editors")


def _run(options: argparse.Namespace) -> None:
    check_versions(OLDEST_FOR_TRAINING)
    if options.keys:
        return _print_keys(options)
    if options.config is None:
        raise ValueError("--config FILE.toml is missing: name the training configuration")
    from ..training.data.build_cache import make_cache
    from ..training.run import run

    if options.stage == CACHE:
        make_cache(options.config, options.set)
    else:
        run(options.stage, options.config, options.set)


def _print_keys(options: argparse.Namespace) -> None:
    from ..training.keys import list_keys, schema_of

    if options.stage not in STAGES:
        raise ValueError(f"--keys lists the keys of a stage, not of {options.stage}: choose {', '.join(STAGES)}")
    listing = json.dumps(schema_of(options.stage), indent=2) if options.json else list_keys(options.stage)
    sys.stdout.write(listing.rstrip() + "\n")
