"""Run by ComfyUI's Python, `inside_int8.py COMFYUI FOLDER OUTPUT`: loads the demo's stages in int8, patches, merges,
saves and samples with them, and reads FOLDER/prior.safetensors, in int8. For test_host_int8.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from inside_lora_training import error_of
from torch import Tensor

from tools.comfyui.in_host import load_pack, seeded, write_results

LAYER = "blocks.2.attention.to_q"
WEIGHT = f"diffusion_model.{LAYER}.weight"
LAYERS = (LAYER, "blocks.0.channelwise.0")


def random_lora(network: Any) -> dict[str, Tensor]:
    """Returns a LoRA of two layers that changes their weights by about a tenth."""
    state = {}
    for name in LAYERS:
        rows, columns = network.get_submodule(name).weight.shape
        state[f"diffusion_model.{name}.lora_up.weight"] = 0.02 * seeded(rows, 4)
        state[f"diffusion_model.{name}.lora_down.weight"] = 0.5 * seeded(4, columns)
    return state


class Stage:
    """The demo's Stage C in one dtype, with an input."""

    def __init__(self, part: Any, dtype: torch.dtype | None):
        from pack.nodes.host.models import load_model

        self.patcher = load_model(part, dtype)
        self.network = self.patcher.model.diffusion_model
        params = self.network.params
        self.inputs = seeded(2, params.c_in, 16, 16), torch.full((2,), 0.5), seeded(2, 77, params.c_cond)

    def noise(self, patcher: Any = None) -> Tensor:
        """Returns the prediction with a patcher's weights."""
        import comfy.model_management

        patcher = patcher or self.patcher
        comfy.model_management.load_models_gpu([patcher])
        out: Tensor = self.network(*self.inputs)
        patcher.detach()
        return out

    def with_lora(self) -> Any:
        import comfy.sd

        return comfy.sd.load_lora_for_models(self.patcher, None, random_lora(self.network), 1.0, 1.0)[0]

    def weight(self, patcher: Any = None) -> Tensor:
        """Returns a layer's restored weight with a patcher's patches."""
        import comfy.model_management

        patcher = patcher or self.patcher
        comfy.model_management.load_models_gpu([patcher])
        out: Tensor = self.network.get_submodule(LAYER).weight.dequantize().clone()
        patcher.detach()
        return out


def hooked(stage: Stage, mode: str, on_demand: bool = False) -> list[Tensor]:
    """Returns predictions without a hook's LoRA and with it, twice in turns.

    With `on_demand`, by the plain patcher that ComfyUI makes, for hooks, of one that loads on demand (only on GPUs).
    """
    import comfy.hooks
    import comfy.model_management

    hooks, model = comfy.hooks.create_hook_lora(random_lora(stage.network), 1.0, 1.0), stage.patcher.clone()
    if on_demand:
        model.is_dynamic = lambda: True
        model = model.clone(disable_dynamic=True)
    network = model.model.diffusion_model
    model.hook_mode = getattr(comfy.hooks.EnumHookMode, mode)
    model.register_all_hook_patches(hooks, comfy.hooks.create_target_dict(comfy.hooks.EnumWeightTarget.Model))
    comfy.model_management.load_models_gpu([model])
    out = []
    for chosen in (hooks, None, hooks, None):
        model.patch_hooks(chosen)
        out.append(network(*stage.inputs).clone())
    model.detach()
    return out


def counting(call: Callable[[], Any]) -> int:
    """Returns how many weights a call packs."""
    from pack.nodes.host import int8

    packed, original = [], int8.PackedWeight
    int8.PackedWeight = lambda *args: packed.append(1) or original(*args)
    call()
    int8.PackedWeight = original
    return len(packed)


def saved(patcher: Any, folder: Path) -> Path:
    """Returns the file that ComfyUI's ModelSave writes."""
    import folder_paths
    from comfy_extras.nodes_model_merging import ModelSave

    folder_paths.set_output_directory(str(folder))
    ModelSave().save(patcher, "saved")
    return next(folder.glob("saved_*.safetensors"))


def sampled(stage: Stage) -> Tensor:
    """Returns latents of Würstchen Prior Sample."""
    from pack.nodes.catalogue import NODES

    nodes = {node.__name__: node for node in NODES}
    [latent, _] = nodes["WuerstchenEmptyLatents"].execute(256, 256, 1).args
    text = [[seeded(1, 77, stage.network.params.c_cond), {}]]
    execute = nodes["WuerstchenPriorSample"].execute
    out: Tensor = execute(stage.patcher, text, text, latent, "linear", 3, 4.0, 5).args[0]["samples"]
    return out


def quantised(stage: Stage) -> list[str]:
    """Returns the layers in int8."""
    weights = stage.network.named_parameters()
    return [name.removesuffix(".weight") for name, x in weights if getattr(x, "_qdata", x).dtype == torch.int8]


def main(folder: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    load_pack()
    from comfy_extras.nodes_model_merging import ModelMergeSimple
    from pack.nodes.host import int8
    from pack.nodes.host.models import load_model
    from pack.nodes.loaders import DTYPE_CHOICES
    from pack.wuerstchen_core.checkpoints import demo_path
    from pack.wuerstchen_core.checkpoints.open import open_part
    from pack.wuerstchen_core.common.devices import has_int8

    part, file = (open_part(source, "prior") for source in (demo_path("demo"), Path(folder) / "prior.safetensors"))
    facts: dict[str, Any] = {"choices": list(DTYPE_CHOICES), "fast": has_int8()}
    tensors: dict[str, Tensor] = {"of the file": Stage(file, None).noise()}
    exact = Stage(part, torch.float32)
    tensors |= {"exact": exact.noise(), "exact with lora": exact.noise(exact.with_lora())}
    try:
        stage = Stage(part, torch.int8)
    except ValueError as error:
        facts["refused"] = str(error)
        return tensors, facts

    facts["apple"] = [int8.keeps_int8(file, torch.device("mps")), error_of(int8.check_supported, torch.device("mps"))]
    facts["int8"], facts["sizes"] = quantised(stage), [stage.patcher.model_size(), exact.patcher.model_size()]
    facts["int8 of the file"] = quantised(Stage(file, None))
    name = "blocks.0.channelwise.0.weight"
    partly = replace(file, state_dict={**file.state_dict, name: part.state_dict[name]})
    facts["int8 of a part"] = quantised(Stage(partly, None))
    facts["packed"] = [counting(stage.noise), counting(stage.noise), counting(lambda: stage.noise(stage.with_lora()))]
    tensors |= {"weight": stage.weight(), "weight with lora": stage.weight(stage.with_lora())}
    tensors |= {f"lora/{key}": x for key, x in random_lora(stage.network).items()}
    tensors |= {"before": stage.noise(), "with lora": stage.noise(stage.with_lora()), "after lora": stage.noise()}
    for mode in ("MaxSpeed", "MinVram"):
        tensors |= {f"{mode}/{i}": x for i, x in enumerate(hooked(stage, mode))}
        tensors |= {f"{mode}, on demand/{i}": x for i, x in enumerate(hooked(stage, mode, on_demand=True))}
    tensors["after hooks"] = stage.noise()
    tensors |= {"sampled": sampled(stage), "exact sampled": sampled(exact)}

    for name, own in (("merged", stage), ("exact merged", exact)):
        [merged] = ModelMergeSimple().merge(own.patcher, exact.with_lora(), 0.5)
        tensors[name] = own.noise(merged)

    saved_part = open_part(saved(stage.with_lora(), Path(folder)), "prior")
    again = Stage(saved_part, None)
    facts["int8 again"] = quantised(again)
    tensors |= {"saved": again.noise(), "saved in fp32": Stage(saved_part, torch.float32).noise()}

    decoder = open_part(demo_path("demo"), "decoder")
    for name, dtype in (("decoder", torch.int8), ("exact decoder", torch.float32)):
        network = load_model(decoder, dtype).model.diffusion_model
        text = seeded(1, 77, network.params.clip_embd)
        prior = seeded(1, 16, 6, 6)
        tensors[name] = network(seeded(1, 4, 64, 64), torch.full((1,), 0.5), text, stable_cascade_prior=prior)
    return tensors, facts


if __name__ == "__main__":
    write_results(main)
