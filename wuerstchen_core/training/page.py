"""The page of a run: an HTML file in its folder with losses, sample grids and configuration."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..common.atomic import write_text
from .chart import draw_chart, smooth
from .checkpoint import read_log
from .config import read_config
from .run_folder import CONFIG, read_starts

PAGE = "run.html"
TEMPLATE = Path(__file__).parent / "templates" / PAGE
GRIDS = {  # the first parts of their files' names, and what they show
    "samples": "Images of the prompts",
    "sheet": "Training images (upper rows) and results (below them)",
}


def write_page(folder: Path, name: str, done: int, steps: int) -> None:
    """Writes the page of a run of `name` in its folder, after `done` of its `steps`; it needs no network."""
    from jinja2 import Environment, StrictUndefined

    rows = read_log(folder)
    training, validation = ([(row["step"], row[key]) for row in rows if key in row] for key in ("loss", "validation"))
    logged = [row for row in rows if "seconds" in row]
    facts: dict[str, Any] = {"Stage": name, "Step": f"{done} of {steps}"}
    if logged:
        seconds = round(logged[-1]["seconds"])
        facts["Time"] = f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
        facts["Training loss"] = f"{smooth(training)[-1][1]:.4f}"
        facts["Skipped steps"] = logged[-1]["skipped"]
    if validation:
        best, lowest = min(validation, key=lambda row: row[1])
        facts["Validation loss"] = f"{validation[-1][1]:.4f} (lowest: {lowest:.4f} at step {best})"
    text = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True).from_string(
        TEMPLATE.read_text("utf-8")
    )
    config = folder / CONFIG
    configuration = read_config(config, []) if config.is_file() else {}
    page = text.render(
        title=configuration.get("modelspec", {}).get("title") or name,
        facts=facts,
        chart=draw_chart({"training": training, "mean": smooth(training), "validation": validation}),
        grids=[(kind, title, found) for kind, title in GRIDS.items() if (found := list(_grids(folder, kind, done)))],
        weights=sorted(path.name for path in folder.glob("*.safetensors")),
        starts=read_starts(folder),
        prompts=configuration.get("sample", {}).get("prompts", []),
        configuration=config.read_text("utf-8") if config.is_file() else "",
    )
    write_text(folder / PAGE, page)


def _grids(folder: Path, kind: str, last: int) -> Iterator[tuple[int, str]]:
    """Yields step and file of each grid of a kind up to step `last`: later ones are of an earlier run."""
    for path in sorted(folder.glob(f"{kind}-*.png")):
        step = path.stem.removeprefix(f"{kind}-")
        if step.isdecimal() and int(step) <= last:
            yield int(step), path.name
