"""docs/samplers.md from what sampler_table.py measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

Cell = tuple[str, str, str]  # stage, sampler, scheduler
Rows = Mapping[Cell, Mapping[str, Any]]
Interval = Callable[[int, int], tuple[float, float]]

OURS = ("ours", "linear")  # Würstchen Sampler along Würstchen Scheduler: what all else is compared with
RECOMMENDED = {"prior": {("ddpm", "simple")}, "decoder": {("ddpm", "simple"), ("euler_ancestral", "simple")}}

TEXT = """# Samplers and schedulers

What ComfyUI's own sampling nodes make of Würstchen. This page is written by `tools/comfyui/sampler_table.py`.

## What to use

1. **Würstchen Prior Sample** and **Würstchen Decoder Sample**, or SamplerCustom and SamplerCustomAdvanced with
   **Würstchen Scheduler** and **Würstchen Sampler**: the original's DDPM and its schedules, last step included; or,
   for the shipped model, *fast* with *ddim* ([fewer steps](steps.md)).
   Würstchen was trained for it, and its authors judged it with it.
2. KSampler with **ddpm** and **simple**: the same steps at the same times; only the last one differs, which returns
   the clean picture where the original keeps a hundredth of the noise. The times of 10, 12, 20, 30 and 60 steps are
   exact.
3. At Stage B an ancestral sampler, such as **euler_ancestral** with **simple**. Of Stable Cascade, whose Stage B has
   the same task, [ComfyUI's author says][5297] that others give artifacts. The model that ships here does not show
   that; the advice is for the released weights, and the log repeats it once a loaded model.

`ddim_uniform` starts one step below the largest noise, as it does with every model; `linear_quadratic` is made for
models of another kind and stops at a high noise level, so that Stage C gets things wrong (the log says so);
`kl_optimal` with a single step divides by zero. At Stage C stay away from `dpmpp_3m_sde`, and from `ipndm` with
`karras` or `exponential`. No number of steps is too large: the noise level falls with every step, so that multistep
samplers do not divide by zero.

[5297]: https://github.com/comfyanonymous/ComfyUI/issues/5297

## How it was measured

ComfyUI {version}, the shipped model (`{model}`) on a CPU, {count} prompts that it never learned, 256x256 pixels, the
same noise for all. Stage C with {prior_steps} steps and a guidance of {prior_cfg}, decoded by {preview_steps} steps of
Würstchen Sampler; Stage B with {decoder_steps} steps and no guidance. A picture is right if the judge, which looks at
pixels and is no trained network, sees the thing that was asked for. Of {count} pictures a share of 100 % has a 95 %
interval from {low:.0f} % to 100 %: the table tells what breaks, and not what is a little better. `*_gpu` samplers are
those without it where there is no GPU, and `ddim` is `euler`: they are not listed. dpm_fast and dpm_adaptive choose
their own steps.

To make it again: `python tools/comfyui/sampler_table.py COMFYUI FOLDER`, with the ComfyUI's own Python. FOLDER keeps
what is measured, so that it may be stopped.
"""

STAGE = """
## {title}

{legend} Würstchen Sampler along Würstchen Scheduler: {ours}.
×: calls of the network, compared with its. **Bold**: recommended. NaN: not finite. –: the sampler failed.{missing}

{table}
{failures}"""

TITLES = {"prior": "Stage C, Würstchen Prior", "decoder": "Stage B, Würstchen Decoder"}
LEGENDS = {
    "prior": "Right things in percent.",
    "decoder": "Right things in percent, and PSNR against the true drawings in dB.",
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
    """The page. `cells` are all of the table, `rows` those that were measured; `facts` are what TEXT names."""
    cells, count = list(cells), facts["count"]
    text = TEXT.format(low=100 * interval(count, count)[0], **facts)
    return text + "".join(_stage(rows, cells, stage) for stage in TITLES)
