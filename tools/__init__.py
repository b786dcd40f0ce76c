"""Tools for developers of this project: benchmark, demo recipe, ComfyUI measurements. Never installed."""

from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]  # of the repository
DOCS = ROOT / "docs"


def markdown_table(head: Sequence[object], rows: Iterable[Sequence[object]], numbers: int = 0) -> str:
    """Returns a Markdown table whose last `numbers` columns are aligned to the right."""
    rule = ["---"] * (len(head) - numbers) + ["--:"] * numbers
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in (head, rule, *rows))
