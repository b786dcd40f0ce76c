"""Run by ComfyUI's Python, `inside_compile.py COMFYUI BUNDLE BACKEND OUTPUT`: both stages with and without ComfyUI's
Torch Compile Model node, for test_host_compile.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo.utils as dynamo
from inside_samplers import CFG, SEED, SHAPES, STAGES, conditions, first
from torch import Tensor

from tools.comfyui.in_host import load_pack, seeded, write_results

EAGER = "eager"  # the backend that traces graphs without compiling them
SIZES = {"other size": (2, 16, 5, 3), "third size": (2, 16, 4, 6)}  # of the prior, which compiles fastest

PATCHED = {"prior": "blocks.0.channelwise.4.weight", "decoder": "down_blocks.1.1.channelwise.4.weight"}


def sampler_of(stage: str, widths: dict[str, int]) -> Callable[..., Tensor]:
    """Returns a function that samples latents of a shape with a MODEL of a stage."""
    from comfy_extras.nodes_custom_sampler import SamplerCustom
    from pack.nodes.sampling import WuerstchenSampler, WuerstchenScheduler

    def generate(model: Any, shape: tuple[int, ...] = SHAPES[stage]) -> Tensor:
        sigmas, latent = first(WuerstchenScheduler.execute(model, "linear", 2)), {"samples": torch.zeros(shape)}
        common = (*conditions(stage, widths), first(WuerstchenSampler.execute()), sigmas, latent)
        return first(SamplerCustom().sample(model, True, SEED, CFG[stage], *common))["samples"]

    return generate


def main(bundle: str, backend: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from comfy_extras.nodes_torch_compile import TorchCompileModel

    load_pack()
    from pack.nodes.host import models
    from pack.wuerstchen_core.checkpoints import read_part

    parts = {stage: read_part(bundle, stage) for stage in STAGES}
    widths = {"prior": parts["prior"].params.c_cond, "decoder": parts["decoder"].params.clip_embd}
    tensors: dict[str, Tensor] = {}
    facts: dict[str, Any] = {}
    for stage in STAGES:
        before = dynamo.counters["stats"]["unique_graphs"]
        plain, generate = models.load_model(parts[stage]), sampler_of(stage, widths)
        compiled = first(TorchCompileModel.execute(plain, backend))
        sizes = SIZES if stage == "prior" and backend == EAGER else {}
        for name, shape in {"first": SHAPES[stage], "again": SHAPES[stage], **sizes}.items():
            tensors[f"plain/{stage} {name}"] = generate(plain, shape)
            tensors[f"compiled/{stage} {name}"] = generate(compiled, shape)
            facts[f"{stage} {name}"] = dynamo.counters["stats"]["unique_graphs"] - before
        key = f"diffusion_model.{PATCHED[stage]}"
        patch = {key: (seeded(*plain.model.state_dict()[key].shape),)}
        for way, model in (("plain", plain.clone()), ("compiled", compiled)):
            model.add_patches(patch, 0.5)
            tensors[f"{way}/{stage} patched"] = generate(model)
        facts[f"{stage} patched"] = dynamo.counters["stats"]["unique_graphs"] - before
    return tensors, facts


if __name__ == "__main__":
    write_results(main)
