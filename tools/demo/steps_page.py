"""Writes docs/steps.md and its plot from the results of the step study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .judge import wilson_interval
from .steps_trials import (
    COUNTS,
    EVERY,
    FAST,
    HARD,
    HARD_SEEDS,
    PREVIEW,
    REFERENCE,
    SAMPLERS,
    SHAPES,
    WHOLE_EVERY,
    Trial,
)

TEMPLATE = Path(__file__).with_name("steps.md.template")
Row = Mapping[str, Any]
PSNR_LOSS, DETAIL_CHANGE = 0.1, 0.05  # dB and fraction that count as equal
COLOURS = dict(zip(SHAPES, ("#2f6f9f", "#b5482f", "#5b8c3e", "#7a4f9f"), strict=True))
LINES = dict(zip(SAMPLERS, ("-", "--", ":"), strict=True))
TITLES = {"prior": "Stage C", "decoder": "Stage B"}
NUMBERS = {"prior": "error", "decoder": "psnr"}
SHOWN = {"thing": "{}: right things in %", "error": "{}: error of the features in %", "psnr": "{}: PSNR in dB"}


def as_good(row: Row, reference: Row, count: int) -> bool:
    """True if a trial of `count` images is no worse than its stage's reference in every measured respect."""
    for name in ("thing", "background"):
        most, least = (wilson_interval(one[name], count) for one in (row, reference))
        if most[1] < least[0]:
            return False
    if row["stage"] == "prior":
        return bool(row["error"] <= reference["error"])
    same_detail = abs(row["detail"] / reference["detail"] - 1) <= DETAIL_CHANGE
    return bool(same_detail and row["psnr"] >= reference["psnr"] - PSNR_LOSS)


def key(row: Row) -> Trial:
    """Returns the trial of a row."""
    return row["stage"], row["sampler"], row["schedule"], row["steps"]


def by_trial(results: Mapping[str, Any]) -> dict[Trial, Row]:
    """Returns the rows by trial."""
    return {key(row): row for row in results["rows"]}


def page(results: Mapping[str, Any]) -> str:
    """Returns docs/steps.md."""
    whole = next(iter(results["whole"].values()))
    text = TEMPLATE.read_text("utf-8").format(
        model=results["model"],
        prior=FAST.steps,
        decoder=FAST.decoder_steps,
        held=whole["compressed"]["count"],
        whole=_whole(results["whole"]),
        whole_every=WHOLE_EVERY,
        count=results["count"],
        every=EVERY,
        low=100 * wilson_interval(results["count"], results["count"])[0],
        preview=PREVIEW,
        reference_prior=_describe(REFERENCE["prior"]),
        reference_decoder=_describe(REFERENCE["decoder"]),
        loss=PSNR_LOSS,
        change=DETAIL_CHANGE,
        hard=" and ".join(f'"{prompt}"' for prompt in HARD),
        hard_count=len(HARD) * HARD_SEEDS,
        hard_trials=_hard(results["hard"]),
    )
    return text + "".join(_stage(results, stage) for stage in COUNTS)


def _describe(trial: Trial) -> str:
    stage, sampler, schedule, steps = trial
    return f"{steps} {SAMPLERS[sampler]} steps of *{schedule}* in {TITLES[stage]}"


def _hard(rows: Sequence[Row]) -> str:
    lines = ["| Stage C | wrong |", "|---|--:|"]
    for row in rows:
        trial = f"{row['schedule']}, {row['steps']} steps of {SAMPLERS[row['sampler']]}"
        lines.append(f"| {trial} | {len(HARD) * HARD_SEEDS - row['thing']} |")
    return "\n".join(lines)


def _whole(measured: Mapping[str, Any]) -> str:
    lines = [
        "| Steps | right thing | right background | right thing after compression | PSNR |",
        "|---|---|---|---|---|",
    ]
    for name, found in measured.items():
        rates = [found[key] for key in ("thing", "background", "compressed")]
        cells = ["{percent} % ({interval[0]} to {interval[1]})".format(**rate) for rate in rates]
        lines.append(f"| {' | '.join([name, *cells])} | {found['psnr']['mean']} dB |")
    return "\n".join(lines)


def _stage(results: Mapping[str, Any], stage: str) -> str:
    found, counts, number = by_trial(results), COUNTS[stage], NUMBERS[stage]
    reference = found[REFERENCE[stage]]
    legend = "Right things in percent, and " + (
        "the error of the features in percent." if stage == "prior" else "the PSNR in dB."
    )
    head = f"| schedule | sampler | {' | '.join(map(str, counts))} |\n|---|---|{'--:|' * len(counts)}"
    lines = [f"\n## {TITLES[stage]}\n\n{legend}\n\n{head}"]
    for schedule in SHAPES:
        for sampler in SAMPLERS:
            cells = []
            for steps in counts:
                row = found[stage, sampler, schedule, steps]
                value = f"{100 * row[number]:.1f}" if number == "error" else f"{row[number]:.1f}"
                cell = f"{100 * row['thing'] / results['count']:.0f} · {value}"
                cells.append(f"**{cell}**" if as_good(row, reference, results["count"]) else cell)
            lines.append(f"| {schedule} | {SAMPLERS[sampler]} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot(results: Mapping[str, Any], path: Path) -> None:
    """Plots right things, and the distance from the drawings, over the steps as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found, figure = by_trial(results), Figure(figsize=(10, 6.4), layout="constrained")
    FigureCanvasAgg(figure)
    for column, (stage, counts) in zip(figure.subplots(2, 2).T, COUNTS.items(), strict=True):
        for number, axes in zip(("thing", NUMBERS[stage]), column, strict=True):
            scale = 1.0 if number == "psnr" else 100.0 / (results["count"] if number == "thing" else 1.0)
            for schedule, colour in COLOURS.items():
                for sampler, line in LINES.items():
                    values = [scale * found[stage, sampler, schedule, steps][number] for steps in counts]
                    label = f"{schedule}, {SAMPLERS[sampler]}"
                    axes.plot(counts, values, line, color=colour, label=label, linewidth=1.2)
            reference = scale * found[REFERENCE[stage]][number]
            axes.axhline(reference, color="black", linewidth=0.6)
            axes.set_xscale("log")
            axes.set_xticks(counts, map(str, counts))
            axes.minorticks_off()
            axes.spines[["top", "right"]].set_visible(False)
            axes.set_title(SHOWN[number].format(TITLES[stage]), fontsize=10)
            if number == "error":
                axes.set_yscale("log")
            if number == "thing":
                axes.set_ylim(0, 104)
            else:
                axes.set_xlabel("steps")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(path, dpi=90)
