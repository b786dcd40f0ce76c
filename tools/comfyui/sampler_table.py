"""Paint with every sampler and every scheduler of a ComfyUI, judge the pictures and write docs/samplers.md.

Run by the ComfyUI's own Python: `python -m tools.comfyui.sampler_table COMFYUI FOLDER [PART]`. FOLDER keeps what is
measured; what it has of the same model is not measured again. With PART/PARTS it measures a share of the table, for
several processes at once; what is missing is marked on the page, and measured by a run without. It takes 50 minutes of
one core.
"""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .in_host import enter, load_pack
from .sampler_page import OURS, page

COUNT, SEED = 8, 7  # pictures of a combination; the seed of their noise
PRIOR_STEPS, PRIOR_CFG, DECODER_STEPS = 20, 3.0, 12
PREVIEW_STEPS = 2  # of Stage B under a prior that is measured: as accurate as 12 with the shipped model
STAGES = ("prior", "decoder")
SIZES = {"prior": (16, 6, 6), "decoder": (4, 64, 64)}


class Painter:
    """The shipped model in this ComfyUI, prompts that it never learned, and the noise that all combinations start from.

    On a CPU, samplers named *_gpu are those without it, and ddim is euler: they are not measured twice.
    """

    def __init__(self, count: int = COUNT) -> None:
        from pack.nodes.host import models, sampling
        from pack.tools.demo.evaluate import held_out_scenes
        from pack.tools.demo.judge import Judge, psnr
        from pack.wuerstchen_core.checkpoints import demo_path, read_part
        from pack.wuerstchen_core.demo.artwork import draw_all
        from pack.wuerstchen_core.demo.vocabulary import caption
        from pack.wuerstchen_core.inference.pipeline import WuerstchenPipeline

        self.sampling, self.judge, self.psnr = sampling, Judge(), psnr
        self.model = hashlib.sha256(demo_path().read_bytes()).hexdigest()[:12]
        self.pipe = WuerstchenPipeline.load("demo", device="cpu", dtype="fp32")
        self.patchers = {stage: models.load_model(read_part(demo_path(), stage)) for stage in STAGES}
        self.scenes = random.Random(SEED).sample(held_out_scenes(self.pipe.metadata), count)
        prior, decoder = self.pipe.encode_text([caption(scene) for scene in self.scenes])
        nothing, _ = self.pipe.encode_text([""])
        self.text = decoder
        self.conditions = {"prior": ([[prior, {}]], [[nothing, {}]])}
        self.latents = {stage: torch.zeros(count, *SIZES[stage]) for stage in STAGES}
        self.noise = {stage: sampling.seeded_noise(SEED, count)(self.latents[stage]) for stage in STAGES}
        self.truth = draw_all(self.scenes)
        self.calls = 0
        for patcher in self.patchers.values():
            patcher.model.diffusion_model.register_forward_pre_hook(self.count)
        self.show(self.run("prior", *OURS, PRIOR_STEPS))

    def count(self, *_: Any) -> None:
        """Called before each call of a network."""
        self.calls += 1

    def show(self, features: Tensor) -> None:
        """Make Stage B paint these features [count, 16, 6, 6]."""
        positive = [[self.text, {"stable_cascade_prior": features}]]
        self.conditions["decoder"] = positive, positive

    def run(self, stage: str, sampler: str, scheduler: str, steps: int) -> Tensor:
        """The latents that a combination paints; `linear` is Würstchen Scheduler's, `ours` Würstchen Sampler."""
        import comfy.sample
        import comfy.samplers
        from pack.wuerstchen_core.diffusion.schedule import linear_times

        patcher, (positive, negative) = self.patchers[stage], self.conditions[stage]
        cfg = PRIOR_CFG if stage == "prior" else 1.0
        common = {"latent_image": self.latents[stage], "seed": SEED, "disable_pbar": True}
        noise = self.noise[stage].clone()
        if sampler == "ours":
            sigmas = self.sampling.stage_sigmas(patcher, linear_times(steps))
            chosen = self.sampling.sampler()
            return comfy.sample.sample_custom(patcher, noise, cfg, chosen, sigmas, positive, negative, **common)
        return comfy.sample.sample(patcher, noise, steps, cfg, sampler, scheduler, positive, negative, **common)

    def judged(self, latents: Tensor) -> dict[str, float]:
        """Of Stage B's latents: how many pictures show the right thing and background, and how near to the truth."""
        pictures = [np.asarray(picture) for picture in self.pipe.decode(latents)]
        judged = [(s, self.judge.identify(p, s)) for p, s in zip(pictures, self.scenes, strict=True)]
        return {
            "thing": sum(asked.thing == seen.thing for asked, seen in judged),
            "background": sum(asked.colour == seen.colour for asked, seen in judged),
            "psnr": round(float(np.mean([self.psnr(p, t) for p, t in zip(pictures, self.truth, strict=True)])), 2),
        }

    def measure(self, stage: str, sampler: str, scheduler: str) -> dict[str, Any]:
        """One cell of the table."""
        row: dict[str, Any] = {"stage": stage, "sampler": sampler, "scheduler": scheduler, "count": len(self.scenes)}
        start, self.calls = time.process_time(), 0
        try:
            latents = self.run(stage, sampler, scheduler, PRIOR_STEPS if stage == "prior" else DECODER_STEPS)
        except Exception as error:  # noqa: BLE001  whatever a sampler does is what the table is for
            return row | {"error": f"{type(error).__name__}: {error}"}
        row["seconds"] = round((time.process_time() - start) / len(self.scenes), 4)
        row["calls"] = self.calls
        row["finite"] = bool(latents.isfinite().all())
        if not row["finite"]:
            return row
        if stage == "prior":
            features, (self.conditions["decoder"], kept) = latents, (None, self.conditions["decoder"])
            self.show(features)
            latents = self.run("decoder", *OURS, PREVIEW_STEPS)
            self.conditions["decoder"] = kept
        return row | self.judged(latents)


def combinations() -> Iterator[tuple[str, str, str]]:
    """Every stage, sampler and scheduler that differs from another on a CPU; what all are compared with first."""
    from comfy.samplers import KSampler

    samplers = [name for name in KSampler.SAMPLERS if name != "ddim" and not name.endswith("_gpu")]
    yield from ((stage, *OURS) for stage in STAGES)
    yield from product(STAGES, samplers, KSampler.SCHEDULERS)


def read_rows(folder: Path, model: str) -> dict[tuple[str, str, str], dict[str, Any]]:
    """What was measured of a model so far."""
    lines = [line for path in sorted(folder.glob(f"{model}-*.jsonl")) for line in path.read_text().splitlines()]
    rows = map(json.loads, lines)
    return {(row["stage"], row["sampler"], row["scheduler"]): row for row in rows}


def main(folder: Path, share: str = "1/1") -> None:
    from comfyui_version import __version__
    from pack.tools.demo.judge import wilson_interval

    part, parts = map(int, share.split("/"))
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    painter = Painter()
    done = read_rows(folder, painter.model)
    wanted = list(combinations())
    order = list(dict.fromkeys(scheduler for _, _, scheduler in wanted))  # a table that is cut short has whole columns
    with (folder / f"{painter.model}-{part}.jsonl").open("a") as file:
        for index, cell in enumerate(sorted(wanted, key=lambda cell: order.index(cell[2]))):
            if index % parts == part - 1 and cell not in done:
                file.write(json.dumps(painter.measure(*cell)) + "\n")
                file.flush()
    target = Path(__file__).resolve().parents[2] / "docs" / "samplers.md"
    facts = {"version": __version__, "model": painter.model, "count": COUNT, "preview_steps": PREVIEW_STEPS}
    facts |= {"prior_steps": PRIOR_STEPS, "prior_cfg": PRIOR_CFG, "decoder_steps": DECODER_STEPS}
    text = page(read_rows(folder, painter.model), wanted, wilson_interval, **facts)
    target.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    arguments = enter()
    load_pack()
    with torch.inference_mode():
        main(Path(arguments[0]), *arguments[1:])
