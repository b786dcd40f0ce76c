"""Measure how few steps the shipped model needs: `python -m tools.demo.steps`.

Each sampler paints held-out prompts along each schedule, first at Stage C and then at Stage B. What is measured goes
into steps.json, where a run that was stopped goes on; docs/steps.md and its plot are made of that. Half an hour of
one core.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tqdm import tqdm

from wuerstchen_core.demo.vocabulary import caption
from wuerstchen_core.inference.pipeline import WuerstchenPipeline

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
    some_scenes,
    trials,
    write_results,
)

DOCS = Path(__file__).parents[2] / "docs"


@torch.inference_mode()
def main() -> None:
    """Measure what is missing, then write the page and the plot."""
    results = read_results()
    done = by_trial(results)
    if missing := [trial for trial in trials() if trial not in done]:
        study = Study(some_scenes())
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
