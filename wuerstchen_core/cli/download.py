"""`download`: fetches the published files and puts them where ComfyUI or this package finds them."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from .options import Choices


def add(commands: Any) -> None:
    """Adds the command to the parser's commands."""
    parser = commands.add_parser("download", help="download the published weights from Hugging Face")
    parser.set_defaults(run=_download)
    names = Choices("..checkpoints.published", "SETS")
    parser.add_argument("model", metavar="MODEL", choices=names, help="set of files: %(choices)s")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument(
        "--comfyui", type=Path, metavar="FOLDER", help="ComfyUI's folder: each file goes where its node looks for it"
    )
    target.add_argument("--to", type=Path, metavar="FOLDER", help="folder for all files, for `generate --model FOLDER`")


def _download(options: argparse.Namespace) -> None:
    """Downloads a set of files and prints their paths."""
    from ..checkpoints.download import comfyui_targets, download, folder_targets

    if options.comfyui is not None:
        targets = comfyui_targets(options.model, options.comfyui)
    else:
        targets = folder_targets(options.model, options.to)
    sys.stdout.write("".join(f"{path}\n" for path in download(targets)))
