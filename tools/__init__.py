"""Tools for developers of this project: benchmark, demo recipe, ComfyUI measurements. Never installed."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]  # of the repository
DOCS = ROOT / "docs"
