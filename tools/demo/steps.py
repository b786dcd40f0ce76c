"""Measures how few sampling steps the shipped model needs: `python -m tools.demo.steps`.

Runs each sampler with each schedule on held-out prompts, first in Stage C and then in Stage B, for half an hour of one
core. Results are stored in steps.json, where an interrupted run resumes; docs/steps.md and its plot come from them.
"""

from __future__ import annotations

import torch
from tqdm import tqdm

from wuerstchen_core.demo.vocabulary import caption
from wuerstchen_core.inference.pipeline import WuerstchenPipeline

from .. import DOCS
from .evaluate import evaluate, held_out_scenes
from .steps_page import by_trial, page, plot
from .steps_trials import (
    HARD,
    HARD_SEEDS,
    HARD_TRIALS,
    WHOLE,
    WHOLE_EVERY,
    Study,
    read_results,
    study_scenes,
    trials,
    write_results,
)


@torch.inference_mode()
def main() -> None:
    """Measures the missing trials, then writes the page and the plot."""
    results = read_results()
    done = by_trial(results)
    if missing := [trial for trial in trials() if trial not in done]:
        study = Study(study_scenes())
        results["count"] = len(study.scenes)
        for trial in tqdm(missing, desc="trials"):
            results["rows"].append(study.measure(*trial))
            write_results(results)
    if "hard" not in results:
        study = Study([scene for scene in held_out_scenes({}) if caption(scene) in HARD] * HARD_SEEDS)
        results["hard"] = [study.measure(*trial) for trial in HARD_TRIALS]
        write_results(results)
    for name, changes in WHOLE.items():
        if name not in results["whole"]:
            pipe = WuerstchenPipeline.load("demo", device="cpu", dtype="fp32")
            results["whole"][name] = evaluate(pipe, seeds=1, every=WHOLE_EVERY, **changes)
            write_results(results)
    (DOCS / "steps.md").write_text(page(results), encoding="utf-8")
    plot(results, DOCS / "steps.png")


if __name__ == "__main__":
    main()
