"""Run by ComfyUI's Python, `inside_reuse.py COMFYUI BUNDLE OUTPUT`: Stage B that reuses its deep levels, for
test_host_reuse.py."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from tools.comfyui.in_host import load_pack, seeded, write_results

SHAPE, STEPS, SEED, CFG = (2, 4, 16, 16), 5, 11, 2.0
KEPT = 6  # columns that the mask keeps


class Stage:
    """Stage B in the node and in the core; counts the rows that its finest and its deepest level compute."""

    def __init__(self, bundle: str):
        from pack.nodes.host import models
        from pack.wuerstchen_core.inference.pipeline import WuerstchenPipeline

        self.core = WuerstchenPipeline.load(bundle, device="cpu", dtype="fp32")
        self.patcher = models.load_model(self._read(bundle))
        width = self.patcher.model.params.clip_embd
        self.features, self.text = seeded(2, 16, 2, 2), seeded(1, 77, width)
        self.empty = seeded(1, 77, width).flip(1)
        self.rows = [0, 0]
        network = self.patcher.model.diffusion_model
        for i, layer in enumerate((network.down_blocks[0][0], network.down_blocks[-1][1])):
            layer.register_forward_hook(lambda *args, i=i: self._count(i, args[-1]))
        self.notices: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: self.notices.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger("pack.nodes.host.notices").addHandler(handler)

    def _read(self, bundle: str) -> Any:
        from pack.wuerstchen_core.checkpoints import read_part

        return read_part(bundle, "decoder")

    def _count(self, level: int, out: Tensor) -> None:
        self.rows[level] += len(out)

    def counted(self) -> dict[str, Any]:
        """Returns the rows of both levels and the notices about reuse since the last call."""
        found = {"finest": self.rows[0], "deepest": self.rows[1]}
        found["notices"] = [text for text in self.notices if "reuse" in text]
        self.rows[:] = 0, 0
        self.notices.clear()
        return found

    def cond(self, text: Tensor, **options: Any) -> list[Any]:
        return [text, {"stable_cascade_prior": self.features, **options}]

    def node(
        self, *, model: Any = None, positive: Any = None, cfg: float = 1.0, mask: Any = None, **more: Any
    ) -> Tensor:
        """Returns the latents of Würstchen Decoder Sample."""
        from pack.nodes.sampling import WuerstchenDecoderSample

        latent = {"samples": torch.zeros(SHAPE)} if mask is None else {"samples": self.picture(), "noise_mask": mask}
        positive = positive or [self.cond(self.text)]
        negative = [[self.empty, {"stable_cascade_prior": torch.zeros_like(self.features)}]]
        inputs = {"steps": STEPS, "seed": SEED, "stage_b": latent, "negative": negative, **more}
        return WuerstchenDecoderSample.execute(model=model or self.patcher, positive=positive, cfg=cfg, **inputs).args[
            0
        ]["samples"]

    def picture(self) -> Tensor:
        return seeded(*SHAPE).flip(0)

    def expected(self, reuse: int = 1, cfg: float = 1.0, **edit: Any) -> Tensor:
        """Returns the core's latents with the same inputs."""
        from pack.wuerstchen_core.inference.settings import SamplingSettings

        side = SHAPE[-1] * 4
        sampling = SamplingSettings(side, side, decoder_steps=STEPS, decoder_guidance=cfg, decoder_reuse=reuse)
        text = self.text.expand(2, -1, -1)
        return self.core.sample_decoder(self.features, text, sampling, negative=self.empty, seed=SEED, **edit)


def with_core(stage: Stage) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Samples with the node (`got/...`) and the core (`want/...`)."""
    tensors: dict[str, Tensor] = {}
    facts: dict[str, Any] = {}
    mask = torch.ones(1, SHAPE[2] * 4, SHAPE[3] * 4)
    mask[..., : KEPT * 4] = 0
    masked = {"init": stage.picture(), "mask": mask[:, None, ::4, ::4].expand(2, -1, -1, -1)}
    runs: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "default": ({}, {}),
        "off": ({"reuse": 1}, {}),
        "two": ({"reuse": 2}, {"reuse": 2}),
        "guided": ({"reuse": 2, "cfg": CFG}, {"reuse": 2, "cfg": CFG}),
        "masked": ({"reuse": 2, "mask": mask}, {"reuse": 2, **masked}),
    }
    for name, (got, want) in runs.items():
        tensors[f"got/{name}"] = stage.node(**got)
        facts[name] = stage.counted()
        tensors[f"want/{name}"] = stage.expected(**want)
    with patch.object(stage.patcher.model, "memory_required", lambda *args, **kwargs: 1e18):  # no batches
        tensors["got/apart"], tensors["want/apart"] = stage.node(reuse=2, cfg=CFG), tensors["got/guided"]
        facts["apart"] = stage.counted()
    return tensors, facts


def sample_heun(stage: Stage, reuse: int) -> Tensor:
    """Samples with a sampler that calls the network twice a step."""
    import comfy.sample
    import comfy.samplers
    from pack.nodes.host.feature_reuse import reusing
    from pack.nodes.host.sampling import stage_sigmas
    from pack.wuerstchen_core.diffusion.schedule import linear_times

    sigmas, cond = stage_sigmas(stage.patcher, linear_times(STEPS)), [stage.cond(stage.text)]
    with reusing(stage.patcher, reuse, sigmas) as model:
        sampler = comfy.samplers.sampler_object("heun")
        latent = torch.zeros(SHAPE)
        return comfy.sample.sample_custom(model, seeded(*SHAPE), 1.0, sampler, sigmas, cond, cond, latent, seed=SEED)


def with_other_nodes(stage: Stage) -> dict[str, Any]:
    """Returns the rows and notices of runs in which other nodes change what a call of the network is."""
    import comfy.hooks
    import comfy_extras.nodes_differential_diffusion as differential

    def patched(*names: str) -> Any:
        model = stage.patcher.clone()
        for name in names:
            getattr(model, f"set_model_{name}")(lambda q, k, v, options: (q, k, v))
        return model

    def tiled(apply: Callable[..., Tensor], args: dict[str, Any]) -> Tensor:
        x, t, c = args["input"], args["timestep"], args["c"]
        return torch.lerp(apply(x, t, **c), apply(x.roll(1, -1), t, **c).roll(-1, -1), 0.5)

    tiles = stage.patcher.clone()
    tiles.set_model_unet_function_wrapper(tiled)
    hooks = comfy.hooks.create_hook_lora({}, strength_model=1.0, strength_clip=1.0)
    diff = differential.DifferentialDiffusion()
    by_mask = getattr(diff, "execute", None) or diff.apply
    out = by_mask(stage.patcher)
    halves = [
        stage.cond(stage.text, start_percent=0.0, end_percent=0.7),
        stage.cond(stage.empty, start_percent=0.7, end_percent=1.0),
    ]
    areas = [stage.cond(stage.text), stage.cond(stage.empty, area=(8, 8, 0, 8), strength=1.0)]
    runs: dict[str, dict[str, Any]] = {
        "patched": {"model": patched("attn2_patch")},
        "tiles": {"model": tiles},
        "hooks": {"positive": [stage.cond(stage.text, hooks=hooks)]},
        "mask by step": {"model": getattr(out, "result", out)[0], "mask": torch.full((1, 64, 64), 0.5)},
        "prompt changes": {"positive": halves},
        "areas": {"positive": areas},
    }
    facts: dict[str, Any] = {}
    for name, run in runs.items():
        result = stage.node(**run, reuse=2)
        facts[name] = {**stage.counted(), "same": torch.equal(result, stage.node(**run))}
        stage.counted()
    return facts


def freed(stage: Stage) -> list[bool]:
    """Returns if features were freed after a run, and after one that an error ended."""
    import comfy.model_management
    from pack.nodes.host import feature_reuse

    found: list[weakref.ref[Any]] = []

    class Recorded(feature_reuse.FeatureReuse):
        def __init__(self, *args: Any):
            super().__init__(*args)
            found.append(weakref.ref(self))

    calls = 0

    def interrupt() -> None:
        nonlocal calls
        calls += 1
        if calls > 3:
            raise comfy.model_management.InterruptProcessingException

    with patch.object(feature_reuse, "FeatureReuse", Recorded):
        stage.node(reuse=2)
        with patch.object(comfy.model_management, "throw_exception_if_processing_interrupted", interrupt):
            try:
                stage.node(reuse=2)
            except comfy.model_management.InterruptProcessingException:
                calls = -1
    gc.collect()
    return [calls == -1, *(reference() is None for reference in found)]


def main(bundle: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    load_pack()
    stage = Stage(bundle)
    tensors, facts = with_core(stage)
    for reuse in (1, 2):
        tensors[f"heun/{reuse}"] = sample_heun(stage, reuse)
        facts[f"heun {reuse}"] = stage.counted()
    facts |= with_other_nodes(stage)
    facts["freed"] = freed(stage)
    return tensors, facts


if __name__ == "__main__":
    write_results(main)
