"""docs/steps.md and its plot, from what steps.py measured."""

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

Row = Mapping[str, Any]
PSNR_LOSS, DETAIL_CHANGE = 0.1, 0.05  # dB and share that are as good as nothing
COLOURS = dict(zip(SHAPES, ("#2f6f9f", "#b5482f", "#5b8c3e", "#7a4f9f"), strict=True))
LINES = dict(zip(SAMPLERS, ("-", "--", ":"), strict=True))
TITLES = {"prior": "Stage C", "decoder": "Stage B"}
NUMBERS = {"prior": "error", "decoder": "psnr"}
SHOWN = {"thing": "{}: right things in %", "error": "{}: error of the features in %", "psnr": "{}: PSNR in dB"}

TEXT = """# Fewer steps

How few steps the shipped model needs. This page is written by `python -m tools.demo.steps`, which
measures for half an hour of one core, and goes on where it was stopped.

**Measured for the shipped demo (`{model}`) alone.** We never ran the released weights: theirs are the published
schedules, *original* with 30 steps and 12 of Stage B.

## The schedule `fast`

{prior} steps of Stage C by DDIM at the times (1 - i/{prior})², so that they shrink towards the picture, and {decoder}
equal steps of Stage B by DDPM: `--schedule fast`, `generate(..., schedule="fast")`, and the choice *fast* in *Würstchen
Prior Sample* (with {decoder} steps in *Würstchen Decoder Sample*) and in *Würstchen Scheduler* (with *ddim* in
*Würstchen Sampler*). {held} held-out prompts (every {whole_every}rd pair of thing and background), and
their pictures after 42.67x compression:

{whole}

![Right things, and how near they are to the drawings, by steps](steps.png)

## How it was measured

{count} held-out prompts (every {every}th pair of thing and background), 256x256 pixels, a guidance of 3, the same
noise for all. A picture is right if the judge, which looks at pixels and is no trained network, sees the thing that was
asked for; if all {count} are, the 95 % interval begins at {low:.0f} %. Right things soon cannot tell schedules apart,
so that other numbers stand beside them: at Stage C the squared error of the features, as a share of the variance of the
drawings' own (its pictures are painted by {preview} steps of Stage B); at Stage B, which paints what 30 steps of
Stage C decided, the PSNR against the drawing.

**Bold**: as good as {reference_prior}, or as
{reference_decoder}: right things and backgrounds within the 95 % intervals, at Stage C no
larger error, at Stage B a PSNR at most {loss} dB lower and as much detail (the mean size of the Laplacian) within
{change:.0%}. PSNR rewards what is smooth, and falls with more steps: it is the detail that a step too few costs. On
sheets, one step of Stage B shows a woven texture. `fast` takes two steps of Stage B more than the fewest in bold. Its
DDIM leaves Stage C's features farther from the drawings' than DDPM does, in any number of steps, and what it paints is
right as often or more often. Not measured with it: pictures to start from, masks, and v1, of which it changes Stage C
alone.

What few steps get wrong now and then shows in more seeds of hard prompts. Of {hard_count} pictures of
{hard} were wrong (0 means fewer than 9 %,
with 95 % confidence):

{hard_trials}

*original* is that schedule's shape, two thirds of the steps down to t = 2/3, in any number of steps; *log-SNR* has
equal steps of the logarithm of signal to noise; *squared* are equal steps, squared.
"""


def as_good(row: Row, reference: Row, count: int) -> bool:
    """Whether a trial of `count` pictures is no worse than its stage's reference, in all that was measured."""
    for name in ("thing", "background"):
        most, least = (wilson_interval(one[name], count) for one in (row, reference))
        if most[1] < least[0]:
            return False
    if row["stage"] == "prior":
        return bool(row["error"] <= reference["error"])
    same_detail = abs(row["detail"] / reference["detail"] - 1) <= DETAIL_CHANGE
    return bool(same_detail and row["psnr"] >= reference["psnr"] - PSNR_LOSS)


def key(row: Row) -> Trial:
    """The trial that a row was measured of."""
    return row["stage"], row["sampler"], row["schedule"], row["steps"]


def by_trial(results: Mapping[str, Any]) -> dict[Trial, Row]:
    """Trials by stage, sampler, schedule and steps."""
    return {key(row): row for row in results["rows"]}


def page(results: Mapping[str, Any]) -> str:
    """The page."""
    whole = next(iter(results["whole"].values()))
    text = TEXT.format(
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
        reference_prior=_called("prior"),
        reference_decoder=_called("decoder"),
        loss=PSNR_LOSS,
        change=DETAIL_CHANGE,
        hard=" and ".join(f'"{prompt}"' for prompt in HARD),
        hard_count=len(HARD) * HARD_SEEDS,
        hard_trials=_hard(results["hard"]),
    )
    return text + "".join(_stage(results, stage) for stage in COUNTS)


def _called(stage: str) -> str:
    _, sampler, schedule, steps = REFERENCE[stage]
    return f"{steps} steps of {SAMPLERS[sampler]} along *{schedule}* at {TITLES[stage]}"


def _hard(rows: Sequence[Row]) -> str:
    lines = ["| Stage C | wrong |", "|---|--:|"]
    for row in rows:
        trial = f"{row['schedule']}, {row['steps']} steps of {SAMPLERS[row['sampler']]}"
        lines.append(f"| {trial} | {len(HARD) * HARD_SEEDS - row['thing']} |")
    return "\n".join(lines)


def _whole(measured: Mapping[str, Any]) -> str:
    lines = ["| Steps | right thing | right background | right thing, compressed | PSNR |", "|---|---|---|---|---|"]
    for name, found in measured.items():
        shares = [found[key] for key in ("thing", "background", "compressed")]
        cells = ["{percent} % ({interval[0]} to {interval[1]})".format(**share) for share in shares]
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
    """Right things, and how near the features or pictures are to the drawings', by steps, as a PNG."""
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
