"""A picture of a report: how many times faster ours is, and how much of the peer's memory it takes."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .report import Report, Row

OURS, LINE = "#2f6f9f", "#b5482f"
WIDTH, BAR, AROUND = 10.0, 0.32, 1.6  # inches


def check(path: Path, peer: bool) -> None:
    """Raise ValueError unless there will be something to draw, and ModuleNotFoundError without matplotlib."""
    if not peer:
        raise ValueError("a plot compares ours with the peer: leave out --plot or --no-peer")
    if path.suffix.lower() != ".png":
        raise ValueError(f"{path} is no PNG: let its name end in .png")
    importlib.import_module("matplotlib.figure")


def plot(report: Report, path: Path) -> None:
    """Write it as a PNG."""
    rows = [row for row in report.rows if row.ratio("median")]
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, BAR * len(rows) + AROUND), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    peer = f"diffusers {report.machine['packages'].get('diffusers', '')}".strip()
    _bars(left, rows, lambda row: row.ratio("median"), "{:.2f}x", f"times as fast as {peer}")
    _bars(right, rows, lambda row: row.ratio("memory", upwards=True), "{:.0%}", f"peak memory, of {peer}'s")
    left.set_yticks(range(len(rows)), [row.case.label for row in rows])
    left.invert_yaxis()
    machine = report.machine
    figure.suptitle(f"{machine['processor']}, {machine['device']}, {machine['threads']} threads", fontsize=9)
    figure.savefig(path, dpi=100)


def _bars(axes: Any, rows: Sequence[Row], value: Callable[[Row], float | None], form: str, title: str) -> None:
    values = [value(row) or 0.0 for row in rows]
    axes.barh(range(len(rows)), values, color=OURS, height=0.7)
    axes.axvline(1, color=LINE, linewidth=1.2, linestyle="--")
    highest = max([1.0, *values])
    for i, number in enumerate(values):
        if number:
            axes.text(number + highest * 0.01, i, form.format(number), va="center", fontsize=8)
    axes.set_xlim(0, highest * 1.15)
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
