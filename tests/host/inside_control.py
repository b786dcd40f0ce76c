"""Run by ComfyUI's Python, `inside_control.py COMFYUI BUNDLE NETS OUTPUT`: ControlNets of the folder NETS that
ComfyUI's own nodes apply to Stage C, for test_host_control.py."""

from __future__ import annotations

from contextlib import suppress
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from conditioning_walk import control_net, logged
from PIL import Image
from torch import Tensor

from tools.comfyui.in_host import load_pack, seeded, write_results

SIZE, STEPS, SEED, CFG = (192, 128), 5, 11, 2.0  # size: width and height
MISTAKES = {
    "another model's net": ("ControlNet", "Würstchen ControlNet Loader"),
    "chained to another model's": ("ControlNet",),
    "another model": ("net.safetensors", "SDXL"),
    "another depth": ("deep.safetensors", "depth 3", "depth 2"),
    "stage b": ("Stage B", "ControlNet of Stage C"),
    "not finite": ("nan.safetensors", "finite"),
    "two channels": ("net.safetensors", "2"),
    "no picture": ("net.safetensors", "0"),
    "windows": ("ControlNet", "context windows"),
}


class Steered:
    """Stage C in the node and in the core."""

    def __init__(self, bundle: str, folder: str):
        from pack.nodes.host import control, models
        from pack.wuerstchen_core.checkpoints import read_part
        from pack.wuerstchen_core.inference.pipeline import WuerstchenPipeline

        self.core, self.folder = WuerstchenPipeline.load(bundle, device="cpu", dtype="fp32"), Path(folder)
        self.prior, self.decoder = (models.load_model(read_part(bundle, name)) for name in ("prior", "decoder"))
        files = sorted(self.folder.glob("*.safetensors"))
        self.nets = {x.stem: control.load_control(read_part(x, "control_net"), x.name) for x in files}
        width = self.prior.model.params.c_cond
        self.text, self.empty = seeded(1, 77, width), seeded(1, 77, width).flip(1)
        self.hints = {x.stem: Image.open(x).convert("RGB") for x in self.folder.glob("*.png")}

    def image(self, *names: str) -> Tensor:
        """Returns an IMAGE of hints."""
        return torch.stack([torch.from_numpy(np.array(self.hints[name], dtype=np.float32) / 255) for name in names])

    def cond(self, **options: Any) -> tuple[list[Any], list[Any]]:
        return [[self.text, options]], [[self.empty, {}]]

    def apply(
        self, conds: Any, net: str, image: Tensor, strength: float = 1.0, start: float = 0.0, end: float = 1.0
    ) -> Any:
        import nodes

        return nodes.ControlNetApplyAdvanced().apply_controlnet(*conds, self.nets[net], image, strength, start, end)

    def node(self, conds: Any, batch: int = 1, model: Any = None, cfg: float = CFG) -> Tensor:
        """Returns the latents of Würstchen Prior Sample."""
        from pack.nodes.sampling import WuerstchenPriorSample

        height, width = (-(-side * 3 // 128) for side in SIZE[::-1])
        inputs = {"stage_c": {"samples": torch.zeros(batch, 16, height, width)}, "seed": SEED, "cfg": cfg}
        inputs |= {"positive": conds[0], "negative": conds[1], "schedule": "linear", "steps": STEPS}
        return WuerstchenPriorSample.execute(model=model or self.prior, **inputs).args[0]["samples"]

    def expected(self, *hints: tuple[Any, ...], batch: int = 1, cfg: float = CFG) -> Tensor:
        """Returns the core's latents, steered by hints of (net, picture, strength, start, end)."""
        from pack.wuerstchen_core import Hint

        settings = {"width": SIZE[0], "height": SIZE[1], "prior_steps": STEPS, "prior_guidance": cfg}
        control = [Hint(self.folder / f"{net}.safetensors", self.hints[x], *more) for net, x, *more in hints]
        text = self.text.expand(batch, -1, -1)
        sampling = self.core.sampling.updated(**settings)
        return self.core.sample_prior(text, sampling, negative=self.empty, seed=SEED, control=control)


def with_core(steered: Steered) -> dict[str, Tensor]:
    """Samples with the nodes (`got/...`) and the core (`want/...`)."""
    import nodes

    first, second = steered.image("first"), steered.image("second")
    apply, plain = steered.apply, steered.cond()
    chained = apply(apply(plain, "net", first, 0.7), "other", second, 0.5, 0.0, 0.6)
    one_sided = nodes.ControlNetApply().apply_controlnet(plain[0], steered.nets["net"], first, 1.0)[0]
    runs: dict[str, tuple[Tensor, Tensor]] = {
        "plain": (steered.node(plain), steered.expected()),
        "strength": (steered.node(apply(plain, "net", first, 0.7)), steered.expected(("net", "first", 0.7))),
        "negative": (steered.node(apply(plain, "net", first, 0.0)), steered.expected(("net", "first", 0.0))),
        "start": (
            steered.node(apply(plain, "net", first, 1.0, 0.4)),  # at the time of a step
            steered.expected(("net", "first", 1.0, 0.4, 1.0)),
        ),
        "chained": (steered.node(chained), steered.expected(("net", "first", 0.7), ("other", "second", 0.5, 0.0, 0.6))),
        "batch": (
            steered.node(apply(plain, "net", first), batch=2),
            steered.expected(("net", "first"), batch=2),
        ),
        "old node": (steered.node((one_sided, plain[1])), steered.expected(("net", "first"))),
        "cancelled": (after_a_cancelled_run(steered), steered.expected(("net", "first"))),
        "half": (steered.node(apply(plain, "half", first)), steered.expected(("half", "first"))),
    }
    return {f"{side}/{name}": pair[i] for name, pair in runs.items() for i, side in enumerate(("got", "want"))}


def after_a_cancelled_run(steered: Steered) -> Tensor:
    """Returns the latents of a batch of one after a run with the same conditioning and a batch of two was cancelled."""
    conds, network = steered.apply(steered.cond(), "net", steered.image("first", "second")), steered.prior.model

    def cancel(*_: Any) -> None:
        raise InterruptedError

    hook = network.diffusion_model.register_forward_hook(cancel)
    with suppress(InterruptedError):
        steered.node(conds, batch=2)
    hook.remove()
    assert conds[0][0][1]["control"].controls
    return steered.node(conds)


def in_comfyui(steered: Steered) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Samples with what only ComfyUI has: a hint per picture, and masks and areas."""
    both, first = steered.image("first", "second"), steered.image("first")
    plain = steered.cond()
    tensors = {"two hints": steered.node(steered.apply(plain, "net", both), batch=2)}
    tensors["second hint"] = steered.node(steered.apply(plain, "net", both[[1, 0]]), batch=2)
    mask = torch.zeros(1, 3, 5)
    mask[..., :2] = 1
    for name, options in (("area", {"area": (3, 2, 0, 0), "strength": 1.0}), ("mask", {"mask": mask})):
        conds = steered.cond(**options, mask_strength=1.0)
        tensors[f"{name} without"] = steered.node(([*conds[0], *plain[0]], plain[1]))
        [positive, _] = steered.apply(conds, "net", first)
        tensors[name] = steered.node(([*positive, *plain[0]], plain[1]))
    with logged() as messages:
        steered.node(steered.apply(plain, "net", 1 - steered.image("wide")))
        steered.nets["net"].set_extra_arg("control_type", [3])
        tensors["no step"] = steered.node(steered.apply(plain, "net", first, 1.0, 0.05, 0.1))
        steered.node(steered.apply(plain, "retrained", first))
    return tensors, {"notices": [text for text in messages if ".safetensors" in text]}


def memory(steered: Steered) -> dict[str, Any]:
    """Returns what ComfyUI's memory management sees of a chained ControlNet, and of one that is loaded in part."""
    import comfy.model_management
    import comfy.model_patcher
    import comfy.sampler_helpers

    conds = steered.apply(steered.cond(), "net", steered.image("first"))
    conds = steered.apply(conds, "other", steered.image("second"))
    control = conds[0][0][1]["control"]
    steered.node(conds)
    models, size = comfy.sampler_helpers.get_additional_models({"positive": [conds[0][0][1]]}, torch.float32)
    large = steered.apply(steered.cond(), "net", torch.zeros(1, 4000, 6000, 1).expand(-1, -1, -1, 3))[0][0][1][
        "control"
    ]
    large.latents = control.latents
    compiled = SimpleNamespace(diffusion_model=torch.compile(steered.prior.model.diffusion_model, backend="eager"))
    control.pre_run(compiled, lambda percent: 1 - percent)
    loaded = [one.model for one in comfy.model_management.current_loaded_models]
    network, meta = steered.nets["net"].patcher.model, torch.device("meta")
    patcher = comfy.model_patcher.ModelPatcher(network, load_device=meta, offload_device=torch.device("cpu"))
    patcher.patch_model(meta, lowvram_model_memory=4000)
    offloaded = sum(not x.is_meta for x in network.parameters())
    out = network(torch.zeros(1, 3, 96, 160, device=meta), (3, 5))
    return {
        "models": sorted(model is steered.nets[name].patcher for model in models for name in ("net", "other")),
        "bytes": size,
        "of a large picture": large.inference_memory_requirements(torch.float32),
        "loaded": all(any(one is model for one in loaded) for model in models),
        "freed": control.controls == {} and control.previous_controlnet.controls == {},
        "offloaded": offloaded,
        "partial": [None if x is None else list(x.shape) for x in out],
        "clone": steered.nets["net"].deepclone_multigpu(torch.device("cpu")).patcher.model is not network,
    }


def mistakes(steered: Steered) -> dict[str, str]:
    """Returns the messages of what cannot work."""
    import comfy_extras.nodes_context_windows as windows

    first, plain = steered.image("first"), steered.cond()
    ours = steered.apply(plain, "net", first)
    foreign = control_net()
    steered.nets["foreign"] = foreign
    chained = steered.apply(steered.apply(plain, "foreign", first), "net", first)
    sdxl = type("SDXL", (SimpleNamespace,), {})(diffusion_model=torch.nn.Identity())
    node = windows.ContextWindowsManualNode
    options = {"context_length": 2, "context_overlap": 0, "context_schedule": "standard_static", "context_stride": 1}
    options |= {"closed_loop": False, "fuse_method": "flat", "dim": 3, "freenoise": False}
    options = {name: x for name, x in options.items() if name in signature(node.execute).parameters}
    windowed = node.execute(model=steered.prior, **options).result[0]

    def stage_b() -> None:
        from pack.nodes.sampling import WuerstchenDecoderSample

        text = seeded(1, 77, steered.decoder.model.params.clip_embd)
        cond = [[text, {"stable_cascade_prior": seeded(1, 16, 2, 2), "control": ours[0][0][1]["control"]}]]
        latents = {"samples": torch.zeros(1, 4, 16, 16)}
        WuerstchenDecoderSample.execute(model=steered.decoder, positive=cond, stage_b=latents, steps=1, cfg=1.0, seed=0)

    runs = {
        "another model's net": lambda: steered.node(steered.apply(plain, "foreign", first)),
        "chained to another model's": lambda: steered.node(chained),
        "another model": lambda: steered.nets["net"].pre_run(sdxl, lambda percent: 1.0),
        "another depth": lambda: steered.node(steered.apply(plain, "deep", first)),
        "stage b": stage_b,
        "not finite": lambda: steered.node(steered.apply(plain, "nan", first)),
        "two channels": lambda: steered.node(steered.apply(plain, "net", first[..., :2])),
        "no picture": lambda: steered.node(steered.apply(plain, "net", first[:0])),
        "windows": lambda: steered.node(ours, model=windowed),
    }
    found = {}
    for name, run in runs.items():
        try:
            run()
        except ValueError as error:
            found[name] = str(error)
    return found


def main(bundle: str, folder: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    load_pack()
    steered = Steered(bundle, folder)
    tensors, facts = in_comfyui(steered)
    return {**with_core(steered), **tensors}, {**facts, "mistakes": mistakes(steered), "memory": memory(steered)}


if __name__ == "__main__":
    write_results(main)
