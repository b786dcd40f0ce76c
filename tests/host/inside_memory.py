"""Run by ComfyUI's Python, `inside_memory.py COMFYUI BUNDLE V1 FOLDER OUTPUT`: networks stored, loaded and evicted in
every way of ComfyUI (`got/...`), and the expected results (`want/...`)."""

from __future__ import annotations

import gc
import importlib
import shutil
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from tools.comfyui.in_host import load_pack, seeded, write_results
from tools.comfyui.measure_memory import NETWORKS, count_live_bytes

Results = tuple[dict[str, Tensor], dict[str, Any]]

STORED = {
    "fp8_e4m3fn": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}
TIMES = (1.0, 0.37, 1e-4)
PARTIAL = 0.6  # fraction of the weights on the device in a partial load
COUNTED = (("bf16", 512, 2), ("fp16", 1024, 1))  # dtype, pixels and batch of the measurements at released sizes
# ComfyUI never frees memory of the device "cpu".
CPU, GPU = torch.device("cpu"), torch.device("cpu:0")
GB = 1024**3


def inputs(part: Any) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Returns the inputs of a stage's network in ComfyUI."""
    t, rows = torch.tensor(TIMES), len(TIMES)
    if part.name == "prior":
        return (seeded(rows, 16, 5, 6), t, seeded(rows, 77, part.params.c_cond)), {}
    extra = {"stable_cascade_prior": seeded(rows, 16, 2, 3)}
    if part.name == "token_decoder":
        tokens = seeded(rows, 16, 24).mul(1000).long() % part.params.num_labels
        return (tokens, t, seeded(rows, 77, part.params.byt5_embd)), extra
    return (seeded(rows, 4, 16, 24), t, seeded(rows, 77, part.params.clip_embd)), extra


def core(part: Any, dtype: torch.dtype | None = None) -> Tensor:
    """Returns the core's fp32 result, with weights rounded to a dtype."""
    from pack.wuerstchen_core.checkpoints import Part, build_part

    rounded = {key: x if dtype is None else x.to(dtype).float() for key, x in part.state_dict.items()}
    (x, t, text), extra = inputs(part)
    return build_part(Part(part.name, part.params, rounded))(x, t, *extra.values(), text)


def predict(patcher: Any, part: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    """Returns the result of ComfyUI's network; ComfyUI keeps the time in fp32."""
    (x, t, text), extra = inputs(part)
    extra = {key: value.to(dtype) for key, value in extra.items()}
    x = x.to(dtype) if x.is_floating_point() else x
    return patcher.model.diffusion_model(x, t, text.to(dtype), **extra).float()


def storage(part: Any) -> Results:
    """Returns results of weights stored in few bits and computed in fp32, and of everything in fp16."""
    import comfy.model_management as management
    from comfy.cli_args import args
    from pack.nodes.host import models

    tensors, facts = {}, {}
    for name, dtype in STORED.items():
        with patch.object(args, f"{name}_unet", True):
            patcher = models.load_model(part)
        parameters = patcher.model.diffusion_model.parameters()
        facts[f"{part.name} {name}"] = sorted({str(p.dtype) for p in parameters})
        tensors[f"got/{part.name} {name}"] = predict(patcher, part)
        tensors[f"want/{part.name} {name}"] = core(part, dtype)
    with patch.object(args, "fp16_unet", True), patch.object(management, "unet_manual_cast", lambda *_: None):
        patcher = models.load_model(part)
    facts[f"{part.name} computes in"] = str(patcher.model.get_dtype_inference())
    rest = 4, *inputs(part)[0][0].shape[-2:]
    whole = models.load_model(part).model
    facts[f"{part.name} estimates"] = {
        "one": whole.memory_required((1, *rest)),
        "batch of 2": whole.memory_required((2, *rest)),
        "twice the area": whole.memory_required((1, rest[0], 2 * rest[1], rest[2])),
        "thrice the area": whole.memory_required((1, rest[0], 3 * rest[1], rest[2])),
        "fp16": patcher.model.memory_required((1, *rest)),
    }
    tensors[f"half/{part.name}"] = predict(patcher, part, torch.float16)
    return tensors, facts


def lora(network: nn.Module) -> dict[str, Tensor]:
    """Returns a LoRA with ComfyUI's keys for every attention and MLP of a network."""
    pairs = {}
    for key, weight in network.state_dict().items():
        if weight.ndim == 2 and (".attention." in key or ".channelwise." in key):
            name = f"diffusion_model.{key.removesuffix('.weight')}"
            pairs[f"{name}.lora_up.weight"] = seeded(weight.shape[0], 2) * 0.2
            pairs[f"{name}.lora_down.weight"] = seeded(2, weight.shape[1]) * 0.2
    return pairs


def changed_norms(model: nn.Module) -> dict[str, Any]:
    """Returns patches of all parameters that do not belong to ComfyUI's layers."""
    return {
        key: ("diff", (seeded(*weight.shape),))
        for key, weight in model.state_dict().items()
        if key.endswith((".gamma", ".beta"))
    }


def partial_loads(part: Any) -> Results:
    """Returns results of a partial load, where the rest is copied for each call: without and with a LoRA, and with a
    merge of the norms, which are no layers."""
    import comfy.sd
    from pack.nodes.host import models

    tensors, facts = {}, {}
    for name in ("plain", "lora", "merge"):
        for key, fraction in (("want", 0), ("got", PARTIAL)):  # 0: all
            patcher = models.load_model(part)
            if name == "lora":
                patcher, _ = comfy.sd.load_lora_for_models(patcher, None, lora(patcher.model.diffusion_model), 0.8, 0.0)
            elif name == "merge":
                patcher.add_patches(changed_norms(patcher.model))
            patcher.patch_model(CPU, lowvram_model_memory=int(fraction * patcher.model_size()))
            tensors[f"{key}/{part.name} partial {name}"] = predict(patcher, part)
            facts[f"{part.name} {key} {name}"] = [patcher.loaded_size(), patcher.model_size()]
    return tensors, facts


def dynamic(part: Any) -> Results:
    """Loads a bf16 file with dynamic VRAM, which builds layers without weights, on a device that computes in fp32.

    The fact "dynamic" is False if this ComfyUI has no such flag.
    """
    from pack.nodes.host import models

    try:
        management = importlib.import_module("comfy.memory_management")
    except ModuleNotFoundError:
        return {}, {"dynamic": False}
    from comfy.model_patcher import ModelPatcherDynamic
    from pack.wuerstchen_core.checkpoints import Part, build_part

    part = Part(part.name, part.params, {key: x.bfloat16() for key, x in part.state_dict.items()})
    with patch.object(management, "aimdo_enabled", True):
        config = models.StageConfig(part.name, part.params)
        config.set_inference_dtype(torch.float32, None)
        bare = config.get_model({}).diffusion_model.state_dict()
        with patch("comfy.model_patcher.CoreModelPatcher", ModelPatcherDynamic):
            patcher = models.load_model(part)
        out = predict(patcher, part)
    facts = {"dynamic": True, f"{part.name} weights before loading": [len(bare), len(build_part(part).state_dict())]}
    return {f"got/{part.name} dynamic": out, f"want/{part.name} dynamic": core(part, torch.bfloat16)}, facts


class Meter:
    """A device of 3 GB on which every loaded network takes 2 GB."""

    def __init__(self, management: Any):
        self.management, self.history = management, []

    def free(self, device: Any = None, torch_free_too: bool = False) -> Any:
        free = 3 * GB - 2 * GB * sum(entry.device == GPU for entry in self.management.current_loaded_models)
        return (free, free) if torch_free_too else free

    def loaded(self) -> list[str]:
        entries = self.management.current_loaded_models
        return [type(entry.model.model).__name__ for entry in entries if entry.device == GPU]


@contextmanager
def small_device() -> Iterator[Meter]:
    import comfy.model_management as management

    meter = Meter(management)
    with (
        patch.object(management, "get_torch_device", lambda: GPU),
        patch.object(management, "text_encoder_device", lambda: GPU),
        patch.object(management, "get_free_memory", meter.free),
    ):
        yield meter


def stable_diffusion() -> Any:
    """Returns a small Stable Diffusion U-Net that requires 4 GB."""
    import comfy.model_base
    import comfy.model_patcher
    import comfy.supported_models

    sizes = {"model_channels": 32, "num_res_blocks": [1, 1], "channel_mult": [1, 2], "num_heads": 2, "context_dim": 32}
    depth = {"transformer_depth": [1, 1], "transformer_depth_middle": 1, "transformer_depth_output": [1] * 4}
    config = comfy.supported_models.SD15(
        {"image_size": 32, "in_channels": 4, "out_channels": 4, "use_spatial_transformer": True, **sizes, **depth}
    )
    config.set_inference_dtype(torch.float32, None)
    model = comfy.model_base.BaseModel(config, device=CPU)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    model.memory_required = lambda *_, **__: 4 * GB
    return comfy.model_patcher.ModelPatcher(model, load_device=GPU, offload_device=CPU)


def denoise(patcher: Any) -> Tensor:
    """Runs two steps of Stable Diffusion in ComfyUI's sampling."""
    import comfy.sample

    cond = [[seeded(1, 77, 32), {}]]
    noise = seeded(1, 4, 8, 8)
    return comfy.sample.sample(patcher, noise, 2, 2.0, "euler", "normal", cond, cond, torch.zeros_like(noise), seed=1)


def generate(objects: Any, meter: Meter) -> Tensor:
    """Runs a whole workflow with the objects of a bundle; the meter records what is loaded after each node."""
    from pack.nodes import latents, sampling, text
    from pack.nodes.vae import WuerstchenVAEDecode

    prior, decoder, prior_clip, decoder_clip, vae, image_encoder = objects

    def run(node: Any, **inputs: Any) -> Any:
        out = node.execute(**inputs).args
        meter.history.append(meter.loaded())
        return out

    stage_c, stage_b = run(latents.WuerstchenEmptyLatents, width=128, height=64, batch_size=1)
    clips = {"prior_clip": prior_clip, "decoder_clip": decoder_clip}
    for_prior, for_decoder = run(text.WuerstchenTextEncode, **clips, text="a red apple")
    settings = {"schedule": "linear", "steps": 2, "cfg": 3.0, "seed": 1}
    [c] = run(
        sampling.WuerstchenPriorSample, model=prior, positive=for_prior, negative=for_prior, stage_c=stage_c, **settings
    )
    [cond] = run(sampling.WuerstchenDecoderConditioning, conditioning=for_decoder, stage_c=c)
    [b] = run(sampling.WuerstchenDecoderSample, model=decoder, positive=cond, stage_b=stage_b, steps=2, cfg=1.0, seed=1)
    [picture] = run(WuerstchenVAEDecode, vae=vae, stage_b=b)
    return torch.cat([picture.flatten(), image_encoder.encode(picture).flatten()])


def networks_of(objects: Any) -> list[nn.Module]:
    """Returns the networks of MODELs, CLIPs and VAEs."""
    return [getattr(thing, "patcher", thing).model for thing in objects]


def eviction(bundle: str, folder: Path) -> Results:
    """Runs two Würstchen models and another model in turn on a device with room for one network."""
    import comfy.model_management as management
    from pack.nodes.host import folders
    from pack.nodes.loaders import WuerstchenBundleLoader

    twin = shutil.copy(bundle, folder / "twin.safetensors")
    tensors: dict[str, Tensor] = {}
    with small_device() as meter:

        def load(path: str) -> Any:
            with patch.object(folders, "bundle_path", lambda _: Path(path)):
                return WuerstchenBundleLoader.execute(path).args

        first, second, other = load(bundle), load(twin), stable_diffusion()
        tensors["want/first"], tensors["want/other"] = generate(first, meter), denoise(other)
        tensors["got/second"], tensors["want/second"] = generate(second, meter), tensors["want/first"]
        tensors["got/other"], tensors["got/first"] = denoise(other), generate(first, meter)
        after_sd = meter.loaded()
        denoise(other)
        after_sd = [after_sd, meter.loaded()]
        management.free_memory(1e30, GPU)
        freed = meter.loaded()
        tensors["got/freed"], tensors["want/freed"] = generate(second, meter), tensors["want/first"]
        management.unload_all_models()
        left = len(management.current_loaded_models)
        alive = [weakref.ref(network) for network in (*networks_of(first), *networks_of(second), other.model)]
        del first, second, other
        gc.collect()
    return tensors, {
        "most at once": max(len(loaded) for loaded in meter.history),
        "loaded in turn": [name for loaded in meter.history for name in loaded],
        "around the other model": after_sd,
        "after free_memory": freed,
        "after unload_all_models": left,
        "alive": sum(ref() is not None for ref in alive),
        "networks": len(alive),
    }


def main(bundle: str, v1: str, folder: str) -> Results:
    load_pack()
    from pack.wuerstchen_core.checkpoints import read_part

    tensors: dict[str, Tensor] = {}
    facts: dict[str, Any] = {}
    parts = [read_part(bundle, name) for name in ("prior", "decoder")] + [read_part(v1, "token_decoder")]
    for part in parts:
        tensors[f"plain/{part.name}"] = core(part)
        for compute in (storage, partial_loads, dynamic):
            more, found = compute(part)
            tensors |= more
            facts |= found
    more, found = eviction(bundle, Path(folder))
    facts["counted"] = [
        (case, count_live_bytes(case)) for name in NETWORKS for case in ((name, *rest) for rest in COUNTED)
    ]
    return tensors | more, facts | found


if __name__ == "__main__":
    write_results(main)
