"""Measures how many sampling steps the shipped model needs: `python -m tools.demo.steps`.

Runs each sampler with each schedule on held-out prompts, first in Stage C and then in Stage B, for half an hour of one
core. Stores the results in steps.json, from which an interrupted run resumes, and writes docs/steps.md and its plot.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from wuerstchen_core.demo.vocabulary import caption
from wuerstchen_core.inference.pipeline import WuerstchenPipeline

from .. import DOCS, markdown_table
from . import reuse_trials, steps_trials
from .evaluate import evaluate, held_out_scenes
from .judge import wilson_interval

TEMPLATE = Path(__file__).with_name("steps.md.template")
Row = Mapping[str, Any]
PSNR_LOSS, DETAIL_CHANGE = 0.1, 0.05  # dB and fraction that count as equal
COLOURS = dict(zip(steps_trials.SHAPES, ("#2f6f9f", "#b5482f", "#5b8c3e", "#7a4f9f"), strict=True))
LINES = dict(zip(steps_trials.SAMPLERS, ("-", "--", ":"), strict=True))
TITLES = {"prior": "Stage C", "decoder": "Stage B"}
NUMBERS = {"prior": "error", "decoder": "psnr"}
SHOWN = {"thing": "{}: right things in %", "error": "{}: error of the features in %", "psnr": "{}: PSNR in dB"}


def as_good(row: Row, reference: Row, count: int) -> bool:
    """True if a trial of `count` images is no worse than its stage's reference in every measured respect."""
    for name in ("thing", "background"):
        (_, highest), (lowest, _) = (wilson_interval(one[name], count) for one in (row, reference))
        if highest < lowest:
            return False
    if row["stage"] == "prior":
        return bool(row["error"] <= reference["error"])
    same_detail = abs(row["detail"] / reference["detail"] - 1) <= DETAIL_CHANGE
    return bool(same_detail and row["psnr"] >= reference["psnr"] - PSNR_LOSS)


def key(row: Row) -> steps_trials.Trial:
    """Returns the trial of a row."""
    return row["stage"], row["sampler"], row["schedule"], row["steps"]


def by_trial(results: Mapping[str, Any]) -> dict[steps_trials.Trial, Row]:
    """Returns the rows by trial."""
    return {key(row): row for row in results["rows"]}


def page(results: Mapping[str, Any]) -> str:
    """Returns docs/steps.md."""
    whole = next(iter(results["whole"].values()))
    age = "" if results["model"] == steps_trials.shipped_model() else ", weights that shipped earlier"
    text = TEMPLATE.read_text("utf-8").format(
        model=results["model"],
        age=age,
        prior=steps_trials.FAST.steps,
        decoder=steps_trials.FAST.decoder_steps,
        held=whole["compressed"]["count"],
        whole=_whole(results["whole"]),
        whole_every=steps_trials.WHOLE_EVERY,
        count=results["count"],
        every=steps_trials.EVERY,
        low=100 * wilson_interval(results["count"], results["count"])[0],
        preview=steps_trials.PREVIEW,
        reference_prior=_describe(steps_trials.REFERENCE["prior"]),
        reference_decoder=_describe(steps_trials.REFERENCE["decoder"]),
        loss=PSNR_LOSS,
        change=DETAIL_CHANGE,
        hard=" and ".join(f'"{prompt}"' for prompt in steps_trials.HARD),
        hard_count=len(steps_trials.HARD) * steps_trials.HARD_SEEDS,
        hard_trials=_hard(results["hard"]),
        reuse=reuse_trials.table(results["reuse"]),
        reuse_count=results["reuse"]["count"],
    )
    return text + "".join(_stage(results, stage) for stage in steps_trials.COUNTS)


def _describe(trial: steps_trials.Trial) -> str:
    stage, sampler, schedule, steps = trial
    return f"{steps} {steps_trials.SAMPLERS[sampler]} steps of *{schedule}* in {TITLES[stage]}"


def _hard(rows: Sequence[Row]) -> str:
    names = [f"{row['schedule']}, {row['steps']} steps of {steps_trials.SAMPLERS[row['sampler']]}" for row in rows]
    wrong = [len(steps_trials.HARD) * steps_trials.HARD_SEEDS - row["thing"] for row in rows]
    return markdown_table(("Stage C", "wrong"), list(zip(names, wrong, strict=True)), 1)


def _whole(measured: Mapping[str, Any]) -> str:
    head = ("Steps", "right thing", "right background", "right thing after compression", "PSNR")
    rows = []
    for name, found in measured.items():
        rates = [found[key] for key in ("thing", "background", "compressed")]
        cells = ["{percent} % ({interval[0]} to {interval[1]})".format(**rate) for rate in rates]
        rows.append([name, *cells, f"{found['psnr']['mean']} dB"])
    return markdown_table(head, rows)


def _stage(results: Mapping[str, Any], stage: str) -> str:
    found, counts, number = by_trial(results), steps_trials.COUNTS[stage], NUMBERS[stage]
    reference = found[steps_trials.REFERENCE[stage]]
    second = "the error of the features in percent" if stage == "prior" else "the PSNR in dB"
    rows = []
    for schedule in steps_trials.SHAPES:
        for sampler in steps_trials.SAMPLERS:
            cells = []
            for steps in counts:
                row = found[stage, sampler, schedule, steps]
                value = f"{100 * row[number]:.1f}" if number == "error" else f"{row[number]:.1f}"
                cell = f"{100 * row['thing'] / results['count']:.0f} · {value}"
                cells.append(f"**{cell}**" if as_good(row, reference, results["count"]) else cell)
            rows.append([schedule, steps_trials.SAMPLERS[sampler], *cells])
    table = markdown_table(("schedule", "sampler", *counts), rows, len(counts))
    return f"\n## {TITLES[stage]}\n\nRight things in percent, and {second}.\n\n{table}\n"


def plot(results: Mapping[str, Any], path: Path) -> None:
    """Plots right things, and the distance from the drawings, over the steps as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found, figure = by_trial(results), Figure(figsize=(10, 6.4), layout="constrained")
    FigureCanvasAgg(figure)
    for column, (stage, counts) in zip(figure.subplots(2, 2).T, steps_trials.COUNTS.items(), strict=True):
        for number, axes in zip(("thing", NUMBERS[stage]), column, strict=True):
            scale = 1.0 if number == "psnr" else 100.0 / (results["count"] if number == "thing" else 1.0)
            for schedule, colour in COLOURS.items():
                for sampler, line in LINES.items():
                    values = [scale * found[stage, sampler, schedule, steps][number] for steps in counts]
                    label = f"{schedule}, {steps_trials.SAMPLERS[sampler]}"
                    axes.plot(counts, values, line, color=colour, label=label, linewidth=1.2)
            reference = scale * found[steps_trials.REFERENCE[stage]][number]
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
    Image.open(path).convert("RGB").quantize().save(path, optimize=True)  # a third of the size


def write_page(results: Mapping[str, Any]) -> None:
    """Writes docs/steps.md."""
    (DOCS / "steps.md").write_text(page(results), encoding="utf-8")


@torch.inference_mode()
def main() -> None:
    """Measures the missing trials, then writes the page and the plot."""
    results = steps_trials.read_results()
    done = by_trial(results)
    if missing := [trial for trial in steps_trials.trials() if trial not in done]:
        study = steps_trials.Study(steps_trials.study_scenes())
        results["count"] = len(study.scenes)
        for trial in tqdm(missing, desc="trials"):
            results["rows"].append(study.measure(*trial))
            steps_trials.write_results(results)
    if "hard" not in results:
        study = steps_trials.Study(
            [scene for scene in held_out_scenes({}) if caption(scene) in steps_trials.HARD] * steps_trials.HARD_SEEDS
        )
        results["hard"] = [study.measure(*trial) for trial in steps_trials.HARD_TRIALS]
        steps_trials.write_results(results)
    if "reuse" not in results:
        results["reuse"] = reuse_trials.measure(steps_trials.study_scenes(steps_trials.WHOLE_EVERY))
        steps_trials.write_results(results)
    for name, changes in steps_trials.WHOLE.items():
        if name not in results["whole"]:
            pipe = WuerstchenPipeline.load("demo", device="cpu", dtype="fp32")
            results["whole"][name] = evaluate(pipe, seeds=1, every=steps_trials.WHOLE_EVERY, **changes)
            steps_trials.write_results(results)
    write_page(results)
    plot(results, DOCS / "steps.png")


if __name__ == "__main__":
    main()
