"""The training recipes that ship, and the commands that their comments name."""

from __future__ import annotations

import shlex
from pathlib import Path

import wuerstchen_core

ROOT = Path(wuerstchen_core.__file__).parent
SHIPPED = [path for folder in ("demo/recipe", "training/recipes") for path in sorted((ROOT / folder).glob("*.toml"))]
_COMMAND = "#   python -m wuerstchen_core "


def command_of(recipe: Path) -> list[str]:
    """Returns the arguments of the command in a recipe's comments, with paths relative to `ROOT.parent`."""
    [line] = [line for line in recipe.read_text("utf-8").splitlines() if line.startswith(_COMMAND)]
    return shlex.split(line.removeprefix(_COMMAND))
