"""Measures ComfyUI's EasyCache on both stages of the shipped model and writes docs/caches.md.

Run it with ComfyUI's own Python: `python -m tools.comfyui.cache_table COMFYUI`. It takes 5 minutes of one core.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .. import DOCS, markdown_table
from .in_host import enter, load_pack
from .sampler_table import OURS, STAGES, TITLES, SamplerStudy

THRESHOLDS = (0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5)
STEPS = {"prior": (12, 20, 30), "decoder": (6, 12, 20)}
WINDOW = (0.15, 0.95)  # EasyCache's defaults: steps outside this part of the run are never skipped
TEMPLATE = Path(__file__).with_name("caches.md.template")


class CacheStudy(SamplerStudy):
    """Runs of the core's sampler with and without EasyCache."""

    def measure_threshold(self, stage: str, steps: int, threshold: float | None, plain: Any = None) -> dict[str, Any]:
        """Returns the latents of a run, its skipped steps, and what its images show."""
        from comfy_extras.nodes_easycache import EasyCacheNode

        model, network_calls = self.patchers[stage], 0
        network = model.model.diffusion_model

        def count(*_: Any) -> None:
            nonlocal network_calls
            network_calls += 1

        head = network.out if stage == "prior" else network.clf
        hook = head.register_forward_hook(count)
        if threshold is not None:
            node = EasyCacheNode.execute(model, threshold, *WINDOW, False)
            self.patchers[stage] = getattr(node, "result", node)[0]
        try:
            latents = self.run(stage, *OURS, steps)
        finally:
            hook.remove()
            self.patchers[stage] = model
        out: dict[str, Any] = {"latents": latents, "calls": network_calls}
        if plain is not None:
            out["change"] = ((latents - plain["latents"]).norm() / plain["latents"].norm()).item()
        return out | self.judge_stage(stage, latents)

    def rows(self, stage: str, steps: int) -> list[list[Any]]:
        """Returns the table's rows of a stage and step count."""
        plain = self.measure_threshold(stage, steps, None)
        rows = [self.row(stage, steps, "–", plain, plain)]
        for threshold in THRESHOLDS:
            found = self.measure_threshold(stage, steps, threshold, plain)
            rows.append(self.row(stage, steps, threshold, found, plain))
        return rows

    def row(self, stage: str, steps: int, threshold: Any, found: dict[str, Any], plain: dict[str, Any]) -> list[Any]:
        count = len(self.scenes)
        right = f"{100 * found['thing'] // count} %"
        skipped = plain["calls"] - found["calls"]
        speed = f"{plain['calls'] / found['calls']:.1f}x"
        change = f"{100 * found.get('change', 0):.1f} %"
        return [threshold, f"{skipped} of {steps}", speed, change, right, f"{found['psnr']:.1f}"]


def main() -> None:
    enter()
    load_pack()
    head = ["threshold", "skipped", "speed", "change of the latents", "right things", "PSNR in dB"]
    with torch.inference_mode():
        study = CacheStudy()
        tables = [
            (TITLES[stage], steps, markdown_table(head, study.rows(stage, steps), numbers=len(head)))
            for stage in STAGES
            for steps in STEPS[stage]
        ]
    sections = [f"## {title}, {steps} steps\n\n{table}\n" for title, steps, table in tables]
    (DOCS / "caches.md").write_text(TEMPLATE.read_text(encoding="utf-8") + "\n".join(sections), encoding="utf-8")


if __name__ == "__main__":
    main()
