"""Plots the training losses of the shipped model from its logs: `python -m tools.demo.curves`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .. import DOCS
from .build import LOGS, STAGES, joined_log

PLOT = DOCS / "curves.png"
WINDOW = 100  # steps, for the thicker line


def means(rows: list[dict[str, Any]], steps: int = WINDOW) -> tuple[list[float], list[float]]:
    """Returns the centres of a log's windows of `steps` steps, and the mean loss in each."""
    groups: dict[int, list[float]] = {}
    for row in rows:
        groups.setdefault(-(-row["step"] // steps), []).append(row["loss"])
    return [(group - 0.5) * steps for group in groups], [sum(losses) / len(losses) for losses in groups.values()]


def plot(folder: Path, path: Path) -> None:
    """Plots each stage's loss over its steps as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 2.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, stage in zip(figure.subplots(1, len(STAGES)), STAGES, strict=True):
        rows = joined_log(folder, stage)
        axes.plot([row["step"] for row in rows], [row["loss"] for row in rows], color="tab:blue", alpha=0.3)
        axes.plot(*means(rows), color="tab:blue")
        axes.set_yscale("log")
        axes.set_title(f"{stage}, {rows[-1]['seconds'] / 3600:.1f} h", fontsize=10)
        axes.set_xlabel("step")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=90)


if __name__ == "__main__":
    plot(LOGS, PLOT)
