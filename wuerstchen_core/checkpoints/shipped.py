"""The models and the LoRA that ship, by the names that sources, commands and metadata use for them."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from ..common.values import to_path

MODELS = {"demo": "wuerstchen-demo.safetensors", "demo-v1": "wuerstchen-demo-v1.safetensors"}
LORAS = {"demo-pink": "wuerstchen-demo-pink.safetensors"}
SHIPPED = MODELS | LORAS

_FOLDER = Path(__file__).parent.parent / "demo"


def shipped_path(name: str) -> Path:
    """Returns the path of a shipped file, of which `SHIPPED` has the names."""
    return _FOLDER / SHIPPED[name]


def demo_path(name: str = "demo") -> Path:
    """Returns the path of the shipped bundle "demo" (v2) or "demo-v1"."""
    return shipped_path(name)


def given_path(source: str | PathLike[str]) -> Path:
    """Returns the path of a source: a path, or the name of a shipped file. Raises ValueError for anything else."""
    return shipped_path(source) if isinstance(source, str) and source in SHIPPED else to_path(source)
