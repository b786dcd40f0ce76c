"""`generate`: paint pictures of a prompt."""

from __future__ import annotations

import argparse
from functools import partial
from typing import TYPE_CHECKING, Any

from .painting import Job, add_count, add_options, run, seeds

if TYPE_CHECKING:
    from PIL import Image

    from ..pipeline import WuerstchenPipeline


def add(commands: Any) -> None:
    """Add the command to a parser's commands."""
    parser = commands.add_parser("generate", help="paint a picture of a prompt")
    parser.set_defaults(run=_run)
    parser.add_argument("prompt", metavar="PROMPT", help='what to paint, such as "a red apple on a blue background"')
    add_options(parser, size="the model's own", name="the prompt")
    add_count(parser)


def _run(options: argparse.Namespace) -> None:
    made = {"prompt": options.prompt, "negative": options.negative}

    def paint(pipeline: WuerstchenPipeline, seed: int, **told: Any) -> list[Image.Image]:
        return pipeline.generate(seed=seed, **made, **told)

    run(options, options.prompt, [Job(seed, partial(paint, seed=seed), made) for seed in seeds(options)])
