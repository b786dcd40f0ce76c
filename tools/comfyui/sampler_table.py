"""Tries every sampler and scheduler of a ComfyUI, judges the images and writes docs/samplers.md.

Run it with ComfyUI's own Python: `python -m tools.comfyui.sampler_table COMFYUI FOLDER [PART/PARTS]`. FOLDER stores the
results; those of the same model are not measured again. PART/PARTS measures one part of the table, so that several
processes can work on it; missing cells are marked on the page, and a run without PART/PARTS measures them. The whole
table takes 50 minutes of one core.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import DOCS, markdown_table
from .in_host import enter, load_pack

COUNT, SEED = 8, 7  # images per combination; the seed of their noise
PRIOR_STEPS, PRIOR_CFG, DECODER_STEPS = 20, 3.0, 12
PREVIEW_STEPS = 2  # of Stage B when Stage C is measured; as accurate as 12 with the shipped model
Cell = tuple[str, str, str]  # stage, sampler, scheduler
Rows = Mapping[Cell, Mapping[str, Any]]
OURS = ("ours", "linear")  # Würstchen Sampler with Würstchen Scheduler, the reference
RECOMMENDED = {"prior": {("ddpm", "simple")}, "decoder": {("ddpm", "simple"), ("euler_ancestral", "simple")}}

TEMPLATE = Path(__file__).with_name("samplers.md.template")
STAGE = """
## {title}

{legend} Würstchen Sampler with Würstchen Scheduler: {ours}.
×: network calls relative to that. **Bold**: recommended. NaN: not finite. –: the sampler failed.{missing}

{table}
{failures}"""

TITLES = {"prior": "Stage C, Würstchen Prior", "decoder": "Stage B, Würstchen Decoder"}
LEGENDS = {
    "prior": "Right things in percent.",
    "decoder": "Right things in percent, and PSNR against the drawings in dB.",
}
STAGES = ("prior", "decoder")
SIZES = {"prior": (16, 6, 6), "decoder": (4, 64, 64)}


class SamplerStudy:
    """The shipped model in this ComfyUI, held-out prompts, and the noise that all combinations start from."""

    def __init__(self, count: int = COUNT) -> None:
        from pack.nodes.host import models, sampling
        from pack.tools.demo.evaluate import held_out_scenes
        from pack.tools.demo.judge import Judge, psnr
        from pack.tools.demo.steps_trials import shipped_model
        from pack.wuerstchen_core.checkpoints import demo_path, read_part
        from pack.wuerstchen_core.demo.artwork import draw_all
        from pack.wuerstchen_core.demo.vocabulary import caption
        from pack.wuerstchen_core.inference.pipeline import WuerstchenPipeline

        self.sampling, self.judge, self.psnr = sampling, Judge(), psnr
        self.model = shipped_model()
        self.pipe = WuerstchenPipeline.load("demo", device="cpu", dtype="fp32")
        self.patchers = {stage: models.load_model(read_part(demo_path(), stage)) for stage in STAGES}
        self.scenes = random.Random(SEED).sample(held_out_scenes(self.pipe.metadata), count)
        prior, decoder = self.pipe.encode_text([caption(scene) for scene in self.scenes])
        nothing, _ = self.pipe.encode_text([""])
        self.text = decoder
        self.conditions = {"prior": ([[prior, {}]], [[nothing, {}]])}
        self.latents = {stage: torch.zeros(count, *SIZES[stage]) for stage in STAGES}
        self.noise = {stage: sampling.seeded_noise(SEED, count)(self.latents[stage]) for stage in STAGES}
        self.drawings = draw_all(self.scenes)
        self.calls = 0
        for patcher in self.patchers.values():
            patcher.model.diffusion_model.register_forward_pre_hook(self.count)
        self.condition_decoder(self.run("prior", *OURS, PRIOR_STEPS))

    def count(self, *_: Any) -> None:
        """Counts a network call."""
        self.calls += 1

    def condition_decoder(self, features: Tensor) -> None:
        """Conditions Stage B on features [count, 16, 6, 6]."""
        positive = [[self.text, {"stable_cascade_prior": features}]]
        self.conditions["decoder"] = positive, positive

    def run(self, stage: str, sampler: str, scheduler: str, steps: int) -> Tensor:
        """Returns the latents of a combination; `ours` with `linear` is Würstchen Sampler with Würstchen Scheduler."""
        import comfy.sample
        import comfy.samplers
        from pack.wuerstchen_core.diffusion.schedule import linear_times

        patcher, (positive, negative) = self.patchers[stage], self.conditions[stage]
        cfg = PRIOR_CFG if stage == "prior" else 1.0
        common = {"latent_image": self.latents[stage], "seed": SEED, "disable_pbar": True}
        noise = self.noise[stage].clone()
        if sampler == "ours":
            sigmas = self.sampling.stage_sigmas(patcher, linear_times(steps))
            chosen = self.sampling.sampler_object("ddpm")
            return comfy.sample.sample_custom(patcher, noise, cfg, chosen, sigmas, positive, negative, **common)
        return comfy.sample.sample(patcher, noise, steps, cfg, sampler, scheduler, positive, negative, **common)

    def judge_latents(self, latents: Tensor) -> dict[str, float]:
        """Returns how many images of Stage B's latents show the right thing and background, and their PSNR."""
        images = [np.asarray(image) for image in self.pipe.decode(latents)]
        judged = [(s, self.judge.identify(image, s)) for image, s in zip(images, self.scenes, strict=True)]
        return {
            "thing": sum(scene.thing == seen.thing for scene, seen in judged),
            "background": sum(scene.colour == seen.colour for scene, seen in judged),
            "psnr": round(float(np.mean([self.psnr(a, b) for a, b in zip(images, self.drawings, strict=True)])), 2),
        }

    def measure(self, stage: str, sampler: str, scheduler: str) -> dict[str, Any]:
        """Returns the results of one cell of the table."""
        row: dict[str, Any] = {"stage": stage, "sampler": sampler, "scheduler": scheduler, "count": len(self.scenes)}
        start, self.calls = time.process_time(), 0
        try:
            latents = self.run(stage, sampler, scheduler, PRIOR_STEPS if stage == "prior" else DECODER_STEPS)
        except Exception as error:  # noqa: BLE001  the table reports whatever a sampler raises
            return row | {"error": f"{type(error).__name__}: {error}"}
        row["seconds"] = round((time.process_time() - start) / len(self.scenes), 4)
        row["calls"] = self.calls
        row["finite"] = bool(latents.isfinite().all())
        if not row["finite"]:
            return row
        return row | self.judge_stage(stage, latents)

    def judge_stage(self, stage: str, latents: Tensor) -> dict[str, float]:
        """Returns `judge_latents` of a stage's latents; those of Stage C go through a few steps of Stage B first."""
        if stage == "prior":
            original = self.conditions["decoder"]
            self.condition_decoder(latents)
            latents = self.run("decoder", *OURS, PREVIEW_STEPS)
            self.conditions["decoder"] = original
        return self.judge_latents(latents)


def combinations() -> Iterator[Cell]:
    """Yields every stage, sampler and scheduler, the reference first.

    On a CPU, samplers named *_gpu equal those without the suffix, and ddim equals euler: they are left out.
    """
    from comfy.samplers import KSampler

    samplers = [name for name in KSampler.SAMPLERS if name != "ddim" and not name.endswith("_gpu")]
    yield from ((stage, *OURS) for stage in STAGES)
    yield from product(STAGES, samplers, KSampler.SCHEDULERS)


def read_rows(folder: Path, model: str) -> dict[Cell, dict[str, Any]]:
    """Returns the stored results of a model."""
    lines = [line for path in sorted(folder.glob(f"{model}-*.jsonl")) for line in path.read_text().splitlines()]
    rows = map(json.loads, lines)
    return {(row["stage"], row["sampler"], row["scheduler"]): row for row in rows}


def _cell(stage: str, row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "·"
    if "error" in row:
        return "–"
    if not row["finite"]:
        return "NaN"
    percent = f"{100 * row['thing'] / row['count']:.0f}"
    return f"{percent} · {row['psnr']:.1f}" if stage == "decoder" else percent


def _stage(rows: Rows, cells: Sequence[Cell], stage: str) -> str:
    """Returns the section of a stage."""
    cells = [cell for cell in cells if cell[0] == stage and cell[1:] != OURS]
    schedulers = list(dict.fromkeys(scheduler for _, _, scheduler in cells))
    ours, lines = rows[(stage, *OURS)], []
    for sampler in dict.fromkeys(sampler for _, sampler, _ in cells):
        found = {scheduler: rows.get((stage, sampler, scheduler)) for scheduler in schedulers}
        calls = [row["calls"] for row in found.values() if row and "calls" in row]
        texts = [
            f"**{_cell(stage, row)}**" if (sampler, scheduler) in RECOMMENDED[stage] else _cell(stage, row)
            for scheduler, row in found.items()
        ]
        lines.append([sampler, f"{max(calls) / ours['calls']:.1f}" if calls else "", *texts])
    failed = [
        f"- {s} with {c}: {rows[stage, s, c]['error']}" for _, s, c in cells if "error" in rows.get((stage, s, c), {})
    ]
    return STAGE.format(
        title=TITLES[stage],
        legend=LEGENDS[stage],
        ours=_cell(stage, ours),
        missing=" ·: not measured yet." if any(cell not in rows for cell in cells) else "",
        table=markdown_table(("sampler", "×", *schedulers), lines, 1 + len(schedulers)),
        failures="\n" + "\n".join(failed) + "\n" if failed else "",
    )


def main(folder: Path, part_of: str = "1/1") -> None:
    from comfyui_version import __version__
    from pack.tools.demo.judge import wilson_interval

    part, parts = map(int, part_of.split("/"))
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    study = SamplerStudy()
    done = read_rows(folder, study.model)
    cells = list(combinations())
    order = list(dict.fromkeys(scheduler for _, _, scheduler in cells))  # so an interrupted table has whole columns
    with (folder / f"{study.model}-{part}.jsonl").open("a") as file:
        for index, cell in enumerate(sorted(cells, key=lambda cell: order.index(cell[2]))):
            if index % parts == part - 1 and cell not in done:
                file.write(json.dumps(study.measure(*cell)) + "\n")
                file.flush()
    rows = read_rows(folder, study.model)
    text = TEMPLATE.read_text("utf-8").format(
        version=__version__,
        model=study.model,
        count=COUNT,
        preview_steps=PREVIEW_STEPS,
        prior_steps=PRIOR_STEPS,
        prior_cfg=PRIOR_CFG,
        decoder_steps=DECODER_STEPS,
        low=100 * wilson_interval(COUNT, COUNT)[0],
    )
    text += "".join(_stage(rows, cells, stage) for stage in STAGES)
    (DOCS / "samplers.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    arguments = enter()
    load_pack()
    with torch.inference_mode():
        main(Path(arguments[0]), *arguments[1:])
