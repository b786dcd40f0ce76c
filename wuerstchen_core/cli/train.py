"""`train`: trains one stage, or computes the latent cache for it."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from ..common.command_line import command
from ..common.versions import OLDEST_FOR_TRAINING, check_versions
from .options import Choices

STAGES = (
    "text", "encoder", "vqgan", "decoder", "token-decoder", "prior",
    "lora", "decoder-lora", "token-decoder-lora", "embedding", "decoder-embedding",
    "distill", "decoder-distill", "distill-lora", "decoder-distill-lora", "control",
)  # fmt: skip
CACHE, NEW, EXPORT, COMPARE = "cache", "new", "export", "compare"
OPTIONS = {  # each option, and what it is for
    "path": (NEW, EXPORT, COMPARE),
    "output": (EXPORT, COMPARE),
    "config": (*STAGES, CACHE),
    "set": (*STAGES, CACHE, EXPORT, COMPARE),
    **dict.fromkeys(("step", "push", "private"), (EXPORT,)),
    "keys": STAGES,
    "json": STAGES,
    **dict.fromkeys(("recipe", "model", "pictures", "size"), (NEW,)),
}
INSTALL_HINT = '`pip install "wuerstchen[train]"` or, in the pack\'s folder, `pip install -r requirements-train.txt`'
MEMORY_HINT = "choose a smaller batch, such as --set train.batch=8, or cache.batch=2 for a cache"


def add(commands: Any) -> None:
    """Adds the command to the parser's commands."""
    parser = commands.add_parser("train", help="train one stage")
    parser.set_defaults(run=_run, install_hint=INSTALL_HINT, memory_hint=MEMORY_HINT)
    text = (
        f"{', '.join(STAGES)}; {CACHE}, which encodes a dataset for later training runs; {NEW}, which writes a "
        f"configuration into the folder PATH; {EXPORT}, which writes the weights of the checkpoint PATH, or a folder "
        "with the weights of the run PATH, such as runs/mine/lora, and a model card for others; "
        f"or {COMPARE}, which writes a grid with images of all weights of the run PATH"
    )
    parser.add_argument("stage", metavar="STAGE", choices=(*STAGES, CACHE, NEW, EXPORT, COMPARE), help=text)
    parser.add_argument("path", metavar="PATH", type=Path, nargs="?", help=f"for {NEW}, {EXPORT} and {COMPARE}")
    text = (
        f"file or folder to write to, for {EXPORT} and {COMPARE} (default: beside the checkpoint, in the run's folder)"
    )
    parser.add_argument("--output", type=Path, metavar="PATH", help=text)
    parser.add_argument("--config", type=Path, metavar="FILE.toml", help="training configuration")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a value; repeatable")
    parser.add_argument("--keys", action="store_true", help="list the configuration's keys, with defaults and meanings")
    parser.add_argument("--json", action="store_true", help="with --keys: print a JSON schema, for editors")
    option = parser.add_argument_group(EXPORT, f"What `train {EXPORT} PATH` does for a run.").add_argument
    option("--step", type=step, metavar="N", help="step of the weights (default: the newest)")
    option("--push", metavar="NAME", help="upload the folder to NAME or OWNER/NAME on the Hugging Face hub")
    option("--private", action="store_true", help="with --push: a new model is private")
    option = parser.add_argument_group(NEW, f"What `train {NEW} PATH` writes.").add_argument
    recipes = Choices("..training.new", "RECIPES")
    option("--recipe", choices=recipes, help="what to train: %(choices)s (default: lora)")
    text = 'base model: files, folders or "demo" that together have its parts (default: demo)'
    option("--model", nargs="+", metavar="SOURCE", help=text)
    option("--pictures", type=Path, metavar="FOLDER", help="pictures to train on (default: PATH/pictures)")
    option(
        "--size", type=int, metavar="PIXELS", help="side of the pictures, a multiple of 64 (default: the model's own)"
    )


def step(text: str) -> int:  # argparse's message has this name
    """Parses the number of a step. ValueError unless it is positive."""
    if (number := int(text)) < 1:
        raise ValueError
    return number


def _run(options: argparse.Namespace) -> None:
    check_versions(OLDEST_FOR_TRAINING)
    _check_options(options)
    if options.keys:
        return _print_keys(options)
    if options.stage == NEW:
        return _write_new(options)
    if options.stage == EXPORT:
        return _export(options)
    if options.stage == COMPARE:
        return _compare(options)
    if options.config is None:
        raise ValueError("--config FILE.toml is missing: name the training configuration")
    from ..training.data.build_cache import make_cache
    from ..training.run import run

    if options.stage == CACHE:
        make_cache(options.config, options.set)
    else:
        run(options.stage, options.config, options.set)


def _check_options(options: argparse.Namespace) -> None:
    """Raises ValueError for an option that has no effect on what is to be done."""
    for name, stages in OPTIONS.items():
        value = getattr(options, name)
        if value is not None and value is not False and value != [] and options.stage not in stages:
            label = value if name == "path" else f"--{name}"
            raise ValueError(f"{label} is not for `train {options.stage}`, but for {', '.join(stages)}: leave it out")
    if options.json and not options.keys:
        raise ValueError("--json is for --keys: add that, or leave it out")
    if options.keys and (options.config is not None or options.set):
        raise ValueError("--keys reads no configuration: leave out --config and --set")
    if options.private and not options.push:
        raise ValueError("--private is for --push: add that, or leave it out")


def _print_keys(options: argparse.Namespace) -> None:
    from ..training.keys import list_keys, schema_of

    listing = json.dumps(schema_of(options.stage), indent=2) if options.json else list_keys(options.stage)
    sys.stdout.write(listing.rstrip() + "\n")


def _write_new(options: argparse.Namespace) -> None:
    from ..training.new import count_pictures, train_arguments, write_new

    if options.path is None:
        raise ValueError(f"PATH is missing: name the folder that `train {NEW}` writes to")
    folder = options.pictures or options.path / "pictures"
    pictures, captions = count_pictures(folder)
    paths = write_new(options.path, options.recipe or "lora", options.model or ["demo"], options.pictures, options.size)
    sys.stdout.write("".join(f"wrote {path}\n" for path in paths))
    if pictures:
        sys.stdout.write(f"{folder} has {pictures} pictures, {captions} of them with captions: run\n")
    else:
        sys.stdout.write(f"put pictures and their captions into {folder}, then run:\n")
    sys.stdout.write("".join(f"  {command(train_arguments(path))}\n" for path in paths))


def _export(options: argparse.Namespace) -> None:
    from ..training.export import export, export_run
    from ..training.hub import check_push, push_to_hub

    if options.path is None:
        raise ValueError(f"PATH is missing: name a run, such as runs/mine/lora, or a checkpoint for `train {EXPORT}`")
    if not options.path.is_dir():
        if options.step is not None or options.push:
            raise ValueError(f"--step and --push are for the folder of a run, not for {options.path}: give its folder")
        sys.stdout.write(f"{export(options.path, options.set, options.output)}\n")
        return
    name = check_push(options.push) if options.push else ""
    folder = export_run(options.path, options.set, options.output, options.step, name)
    sys.stdout.write(f"{folder}\n")
    if options.push:
        sys.stdout.write(f"{push_to_hub(folder, name, options.private)}\n")


def _compare(options: argparse.Namespace) -> None:
    from ..training.compare import compare

    if options.path is None:
        raise ValueError(f"PATH is missing: name the folder whose weights `train {COMPARE}` compares")
    sys.stdout.write(f"{compare(options.path, options.set, options.output)}\n")
