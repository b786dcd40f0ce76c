"""Writes docs/samplers.md from the results of `sampler_table`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

Cell = tuple[str, str, str]  # stage, sampler, scheduler
Rows = Mapping[Cell, Mapping[str, Any]]
Interval = Callable[[int, int], tuple[float, float]]

OURS = ("ours", "linear")  # Würstchen Sampler with Würstchen Scheduler, the reference
RECOMMENDED = {"prior": {("ddpm", "simple")}, "decoder": {("ddpm", "simple"), ("euler_ancestral", "simple")}}

TEMPLATE = Path(__file__).with_name("samplers.md.template")
STAGE = """
## {title}

{legend} Würstchen Sampler with Würstchen Scheduler: {ours}.
×: network calls relative to it. **Bold**: recommended. NaN: not finite. –: the sampler failed.{missing}

{table}
{failures}"""

TITLES = {"prior": "Stage C, Würstchen Prior", "decoder": "Stage B, Würstchen Decoder"}
LEGENDS = {
    "prior": "Right things in percent.",
    "decoder": "Right things in percent, and PSNR against the drawings in dB.",
}


def _cell(stage: str, row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "·"
    if "error" in row:
        return "–"
    if not row["finite"]:
        return "NaN"
    percent = f"{100 * row['thing'] / row['count']:.0f}"
    return f"{percent} · {row['psnr']:.1f}" if stage == "decoder" else percent


def _stage(rows: Rows, cells: Iterable[Cell], stage: str) -> str:
    cells = [cell for cell in cells if cell[0] == stage and cell[1:] != OURS]
    schedulers = list(dict.fromkeys(scheduler for _, _, scheduler in cells))
    ours = rows[(stage, *OURS)]
    lines = [
        " | ".join(["", "sampler", "×", *schedulers, ""]),
        " | ".join(["", "---", *["--:"] * (len(schedulers) + 1), ""]),
    ]
    for sampler in dict.fromkeys(sampler for _, sampler, _ in cells):
        found = [rows.get((stage, sampler, scheduler)) for scheduler in schedulers]
        calls = [row["calls"] for row in found if row and "calls" in row]
        texts = [_cell(stage, row) for row in found]
        for i, scheduler in enumerate(schedulers):
            texts[i] = f"**{texts[i]}**" if (sampler, scheduler) in RECOMMENDED[stage] else texts[i]
        cost = f"{max(calls) / ours['calls']:.1f}" if calls else ""
        lines.append(" | ".join(["", sampler, cost, *texts, ""]))
    failed = [
        f"- {s} with {c}: {rows[stage, s, c]['error']}" for _, s, c in cells if "error" in rows.get((stage, s, c), {})
    ]
    return STAGE.format(
        title=TITLES[stage],
        legend=LEGENDS[stage],
        ours=_cell(stage, ours),
        missing=" ·: not measured yet." if any(cell not in rows for cell in cells) else "",
        table="\n".join(line.strip(" ") for line in lines),
        failures="\n" + "\n".join(failed) + "\n" if failed else "",
    )


def page(rows: Rows, cells: Iterable[Cell], interval: Interval, **facts: Any) -> str:
    """Returns the page. cells: the whole table; rows: the measured cells; facts: other fields of the template."""
    cells, count = list(cells), facts["count"]
    text = TEMPLATE.read_text("utf-8").format(low=100 * interval(count, count)[0], **facts)
    return text + "".join(_stage(rows, cells, stage) for stage in TITLES)
