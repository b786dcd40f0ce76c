"""`bench`: how fast and how small, beside diffusers."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from .progress import Bar

QUICK = {"stages": "prior,decoder,vqgan-decode", "sizes": "512,1024", "repeat": 1}


def add(commands: Any) -> None:
    """Add the command to a parser's commands."""
    text = "measure time and memory of full-size networks with random weights, beside diffusers"
    parser = commands.add_parser("bench", help=text, description=text)
    smaller = "choose smaller --sizes or a smaller --batch, or --dtypes bf16"
    parser.set_defaults(run=_run, requirements="requirements-bench.txt", smaller=smaller)
    option = parser.add_argument
    option("--stages", default="all", metavar="NAME,...", help="prior, decoder, vqgan-decode, ... (default: all)")
    option("--sizes", default="512,1024,1536,2048", metavar="PIXELS,...", help="sides of square pictures")
    option("--dtypes", default="bf16,fp32", metavar="NAME,...", help="of bf16, fp32, fp16 (default: bf16,fp32)")
    option("--batch", default="1", metavar="N,...", help="pictures at a time (default: 1)")
    option("--repeat", type=int, default=3, metavar="N", help="rounds that count (default: 3)")
    option("--threads", type=int, default=0, metavar="N", help="of the processor (default: torch's choice)")
    option("--device", default="auto", help="auto, cpu, cuda, ... (default: auto)")
    option("--no-peer", dest="peer", action="store_false", help="measure ours alone")
    option("--no-memory", dest="memory", action="store_false", help="leave out what needs processes of its own")
    option("--no-load", dest="load", action="store_false", help="leave out how long loading takes")
    option("--compile", action="store_true", help="let torch compile both sides' networks")
    option("--quick", action="store_true", help="a short run: the three networks in bf16 at 512 and 1024 pixels")
    option("--json", type=Path, metavar="FILE", help="write all numbers to a file")


def _run(options: argparse.Namespace) -> None:
    from ..bench.cases import check, stage_names
    from ..bench.report import table
    from ..bench.run import Plan, run
    from ..devices import pick_device

    stages, dtypes = stage_names(_names(options.stages)), _names(options.dtypes)
    sizes, batches = _numbers("--sizes", options.sizes), _numbers("--batch", options.batch)
    check(sizes, batches, dtypes, options.repeat)
    plan = Plan(
        stages,
        sizes,
        batches,
        dtypes,
        options.repeat,
        str(pick_device(options.device)),
        options.threads,
        options.peer,
        options.memory,
        options.load,
        options.compile,
    )
    bar = Bar()
    try:
        rows = run(plan, lambda words, done, total: bar.show("bench ", done, total, words))
    finally:
        bar.clear()
    sys.stdout.write(f"{table(rows)}\n")
    if options.json:
        options.json.write_text(json.dumps([row.as_dict() for row in rows], indent=1), encoding="utf-8")


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _numbers(option: str, text: str) -> list[int]:
    words = _names(text)
    if not words or not all(word.isdecimal() for word in words):
        raise ValueError(f"{option} {text!r} is no list of numbers: give some such as 512,1024")
    return [int(word) for word in words]
