"""`generate`: generates images from a prompt, or from a file of prompts."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .options import add_options, run_command


def add(commands: Any) -> None:
    """Adds the command to the parser's commands."""
    parser = commands.add_parser("generate", help="generate images from a prompt, or from a file of prompts")
    parser.set_defaults(run=_run)
    text = 'what to generate, such as "a red apple on a blue background"'
    parser.add_argument("prompt", metavar="PROMPT", nargs="?", help=text)
    add_options(parser, size="the model's own", name="the prompt")
    text = (
        "file to read instead of PROMPT, with a prompt per line (.txt; # starts a comment), or a JSON "
        'object per line: {"prompt": ...} and optionally seed, count, width, height, negative and other settings. '
        "Writes to the folder --output; images that exist there are not "
        "generated again. Invalid lines are reported and skipped (exit code 2, but 0 under a launcher)"
    )
    parser.add_argument("--prompts", type=Path, metavar="FILE", help=text)
    text = "with --prompts: write .tar files, each with the images of LINES lines (default: single files)"
    parser.add_argument("--shards", type=int, metavar="LINES", help=text)
    text = "with --prompts: generate up to N images with equal settings at once (default: 1)"
    parser.add_argument("--batch", type=int, metavar="N", help=text)


def _run(options: argparse.Namespace) -> None:
    if (options.prompt is None) == (options.prompts is None):
        raise ValueError("PROMPT or --prompts is needed, and not both: give one of them")
    if options.prompts is not None:
        from .batch import run

        return run(options)
    if options.shards is not None or options.batch is not None:
        raise ValueError("--shards and --batch need --prompts: remove them, or add it")
    request = {"prompt": options.prompt, "negative": options.negative}
    run_command(options, options.prompt, request, request)
