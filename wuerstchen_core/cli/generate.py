"""`generate`: paint pictures of a prompt."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import batch
from .options import Job, add_count, add_options, run, seeds

if TYPE_CHECKING:
    from PIL import Image

    from ..inference.pipeline import WuerstchenPipeline


def add(commands: Any) -> None:
    """Add the command to a parser's commands."""
    parser = commands.add_parser("generate", help="paint a picture of a prompt, or many of a file of prompts")
    parser.set_defaults(run=_run)
    text = 'what to paint, such as "a red apple on a blue background"'
    parser.add_argument("prompt", metavar="PROMPT", nargs="?", help=text)
    add_options(parser, size="the model's own", name="the prompt")
    add_count(parser)
    text = (
        'instead of PROMPT: a file with a JSON table a line, {"prompt": ...} and what else that one is to have (seed, '
        "count, width, height, negative, and the other options by their names); what is in --output, a folder, is not "
        "painted again; lines that can't be painted are named, and make the exit code 2 (not so under a launcher)"
    )
    parser.add_argument("--prompts", type=Path, metavar="FILE.jsonl", help=text)
    text = "write .tar files, each with the pictures of so many lines of --prompts (default: single files)"
    parser.add_argument("--shards", type=int, metavar="LINES", help=text)
    parser.add_argument(
        "--batch", type=int, metavar="N", help="how many alike of --prompts to paint at once (default: 1)"
    )


def _run(options: argparse.Namespace) -> None:
    if (options.prompt is None) == (options.prompts is None):
        raise ValueError("give either a PROMPT or a file of --prompts")
    if options.prompts is not None:
        batch.run(options)
        return
    if options.shards is not None or options.batch is not None:
        raise ValueError("--shards and --batch are for a file of --prompts: leave them out, or give one")
    made = {"prompt": options.prompt, "negative": options.negative}

    def paint(pipeline: WuerstchenPipeline, seed: int, **told: Any) -> list[Image.Image]:
        return pipeline.generate(seed=seed, **made, **told)

    run(options, options.prompt, [Job(seed, partial(paint, seed=seed), made) for seed in seeds(options)])
