"""`generate`: generates images from a prompt, or from a file of prompts."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .options import add_control, add_options, run_command


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
    text = "repeat an image from its metadata (also one that these nodes saved in ComfyUI); other options change it"
    parser.add_argument("--like", type=Path, metavar="IMAGE", help=text)
    add_control(parser)
    # None until `_run` has read --like, which comes before these defaults.
    names = ("model", "seed", "count", "negative", "dtype", "lora", "embedding", "control")
    defaults = {name: parser.get_default(name) for name in names}
    parser.set_defaults(**dict.fromkeys(defaults), defaults=defaults)


def _run(options: argparse.Namespace) -> None:
    values = dict(options.defaults)
    if options.like is not None:
        from .like import options_of

        if options.prompts is not None:
            raise ValueError("--like repeats one image: remove it, or --prompts")
        values |= options_of(options.like, options)
    for name, value in values.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if (options.prompt is None) == (options.prompts is None):
        raise ValueError("PROMPT, --prompts or --like is needed, and not both PROMPT and --prompts: give one of them")
    if options.prompts is not None:
        from .batch import run

        return run(options)
    if options.shards is not None or options.batch is not None:
        raise ValueError("--shards and --batch need --prompts: remove them, or add it")
    request = {"prompt": options.prompt, "negative": options.negative}
    title = options.prompt if isinstance(options.prompt, str) else " ".join(options.prompt)  # a mix, from --like
    run_command(options, title, dict(request), request)
