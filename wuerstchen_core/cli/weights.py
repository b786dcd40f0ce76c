"""`inspect` and `convert`: what a weight file holds, and the same in another layout or dtype."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from textwrap import fill
from typing import Any

from ..demo.vocabulary import word_list
from .progress import Bar

WIDTH = 100  # columns of the word list


def add(commands: Any) -> None:
    """Add the command to a parser's commands."""
    inspect = commands.add_parser("inspect", help="say what a weight file holds")
    inspect.set_defaults(run=_inspect, requirements="requirements.txt", smaller="close other programs")
    inspect.add_argument("file", metavar="FILE", help='weight file, diffusers folder, or "demo"')
    inspect.add_argument("--words", action="store_true", help="list the words that a small model knows instead")
    inspect.add_argument("--json", action="store_true", help="print JSON")

    convert = commands.add_parser("convert", help="write weights as one bundle, or as single files for ComfyUI")
    convert.set_defaults(run=_convert, requirements="requirements.txt", smaller="close other programs")
    option = convert.add_argument
    option("sources", metavar="SRC", nargs="+", help="weight files, diffusers folders, bundles; together one model")
    option("target", metavar="DST", type=Path, help="NAME.safetensors for a bundle, or a folder for a file each part")
    option("--dtype", default="keep", help="keep (the default), fp32, fp16, bf16, fp8; by part: bf16,vqgan=fp32")
    option("--version", default="auto", choices=("auto", "v1", "v2"), help="whose a prior is that may be either's")
    option("--force", action="store_true", help="write over files that exist")


def _inspect(options: argparse.Namespace) -> None:
    from ..checkpoints.inspect import describe

    if options.words:
        _list_words(options)
        return
    description = describe(options.file)
    text = json.dumps(description.as_dict(), ensure_ascii=False) if options.json else "\n".join(description.lines())
    sys.stdout.write(f"{text}\n")


def _list_words(options: argparse.Namespace) -> None:
    from ..checkpoints.open import open_source

    groups = word_list(open_source(options.file, headers_only=True).metadata.get("vocabulary", {}))
    if options.json:
        text = json.dumps(groups, ensure_ascii=False)
    else:
        text = "\n".join(_paragraph(group, words) for group, words in groups.items())
        text = text or f"{options.file} has no word list: prompts may use any words"
    sys.stdout.write(f"{text}\n")


def _paragraph(group: str, words: list[str]) -> str:
    names = ", ".join(words).replace(" ", "\xa0").replace(",\xa0", ", ")  # lines break between names only
    lines = fill(f"{group} ({len(words)}): {names}", WIDTH, subsequent_indent="  ", break_on_hyphens=False)
    return lines.replace("\xa0", " ")


def _convert(options: argparse.Namespace) -> None:
    from ..checkpoints.convert import convert

    bar = Bar()
    try:
        written = convert(
            options.sources,
            options.target,
            dtype=options.dtype,
            version=options.version,
            force=options.force,
            progress=lambda path, done, total: bar.show(f"{path.name} ", done, total, f"{total / 1e9:.2f} GB"),
        )
    finally:
        bar.clear()
    sys.stdout.write("".join(f"{path}\n" for path in written))
