"""`inspect` and `convert`: describe a weight file, or write it in another layout or dtype."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

from ..demo.vocabulary import word_list
from .options import VERSION_HELP
from .progress import Bar

if TYPE_CHECKING:
    from ..checkpoints.inspect import Description


def add(commands: Any) -> None:
    """Adds the commands to the parser's commands."""
    parser = commands.add_parser("inspect", help="describe a weight file")
    parser.set_defaults(run=_inspect)
    option = parser.add_argument
    option("file", metavar="FILE", help='weight file, diffusers folder, "demo" or "demo-v1"')
    option("--words", action="store_true", help="list the words that the model knows, if they are limited")
    option("--json", action="store_true", help="print JSON")

    parser = commands.add_parser("convert", help="write weights as one bundle, or as files for ComfyUI")
    parser.set_defaults(run=_convert)
    option = parser.add_argument
    option(
        "sources",
        metavar="SRC",
        nargs="+",
        help="weight files, folders or bundles of one model; or a LoRA file",
    )
    option(
        "target",
        metavar="DST",
        type=Path,
        help="NAME.safetensors for a bundle or LoRA, or a folder for one file per part",
    )
    option(
        "--dtype", default="keep", help="keep, fp32, fp16, bf16, fp8 or int8; per part: int8,vqgan=fp32 (default: keep)"
    )
    text = "comfyui: a bundle, or a file per part; diffusers: a folder for its pipelines (default: comfyui)"
    option("--to", default="comfyui", choices=("comfyui", "diffusers"), help=text)
    option("--version", default="auto", choices=("auto", "v1", "v2"), help=VERSION_HELP)
    option("--force", action="store_true", help="overwrite existing files")


def _inspect(options: argparse.Namespace) -> None:
    """Prints a description of a weight file, or with --words its word list. ValueError if a part is damaged."""
    from ..checkpoints.embeddings import describe_embedding, is_embedding
    from ..checkpoints.inspect import describe
    from ..checkpoints.lora_folders import is_lora
    from ..checkpoints.lora_info import describe_lora
    from ..checkpoints.open import open_source, source_path

    problems: dict[str, str] = {}
    if options.words:
        groups = word_list(open_source(options.file, headers_only=True).metadata.get("vocabulary", {}))
        lines = [_paragraph(group, words) for group, words in groups.items()]
        lines = lines or [f"{options.file} has no word list: prompts may use any words"]
        table: dict[str, Any] = groups
    elif is_embedding(path := source_path(options.file)) or is_lora(path):
        other = describe_embedding(path) if is_embedding(path) else describe_lora(path)
        lines, table = other.lines(), asdict(other)
    else:
        description = _with_settings(describe(options.file))
        lines, table, problems = description.lines(), asdict(description), description.problems
    text = json.dumps(table) if options.json else "\n".join(lines)
    sys.stdout.write(f"{text}\n")
    if problems:
        raise ValueError("; ".join(problems.values()))


def _with_settings(description: Description) -> Description:
    """Returns a description whose problems include sampling settings that the model cannot be loaded with."""
    from ..checkpoints.open import open_source
    from ..inference.settings import SamplingSettings

    metadata = open_source(description.source, headers_only=True).metadata
    try:
        SamplingSettings.from_metadata(metadata, "v1" if description.version == "v1" else "v2")
    except ValueError as error:
        return replace(description, problems={**description.problems, "sampling": str(error)})
    return description


def _paragraph(group: str, words: list[str]) -> str:
    names = ", ".join(words).replace(" ", "\xa0").replace(",\xa0", ", ")  # lines break between names only
    lines = fill(f"{group} ({len(words)}): {names}", 100, subsequent_indent="  ", break_on_hyphens=False)
    return lines.replace("\xa0", " ")


def _convert(options: argparse.Namespace) -> None:
    """Converts weights and prints the paths of the written files."""
    from ..checkpoints.convert import convert

    with Bar() as bar:
        written = convert(
            options.sources,
            options.target,
            dtype=options.dtype,
            version=options.version,
            to=options.to,
            force=options.force,
            progress=lambda path, done, total: bar.show(f"{path.name} ", done, total, f"{total / 1e9:.2f} GB"),
        )
    sys.stdout.write("".join(f"{path}\n" for path in written))
