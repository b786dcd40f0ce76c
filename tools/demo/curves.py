"""The losses of the shipped model's training, drawn from its logs: `python -m tools.demo.curves`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .build import RECIPE, STAGES, rows_of

PLOT = Path(__file__).parents[2] / "docs" / "curves.png"
MEAN_OF = 100  # steps, for the thicker line


def means(rows: list[dict[str, Any]], steps: int = MEAN_OF) -> tuple[list[float], list[float]]:
    """The middles of a log's every `steps` steps, and the mean loss in them."""
    groups: dict[int, list[float]] = {}
    for row in rows:
        groups.setdefault(-(-row["step"] // steps), []).append(row["loss"])
    return [(group - 0.5) * steps for group in groups], [sum(losses) / len(losses) for losses in groups.values()]


def both(folder: Path, stage: str) -> list[dict[str, Any]]:
    """The rows of a stage's logs: its second training, if there is one, behind its first."""
    first, more = (rows_of(folder / f"{name}.jsonl") for name in (stage, f"{stage}_again"))
    return [*first, *({**row, **{key: row[key] + first[-1][key] for key in ("step", "seconds")}} for row in more)]


def plot(folder: Path, path: Path) -> None:
    """The loss of each stage by its steps, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 2.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, stage in zip(figure.subplots(1, len(STAGES)), STAGES, strict=True):
        rows = both(folder, stage)
        axes.plot([row["step"] for row in rows], [row["loss"] for row in rows], color="tab:blue", alpha=0.3)
        axes.plot(*means(rows), color="tab:blue")
        axes.set_yscale("log")
        axes.set_title(f"{stage}, {rows[-1]['seconds'] / 3600:.1f} h", fontsize=10)
        axes.set_xlabel("step")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=90)


if __name__ == "__main__":
    plot(RECIPE / "logs", PLOT)
