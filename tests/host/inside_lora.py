"""Run by ComfyUI's Python, `inside_lora.py COMFYUI BUNDLE LORAS OUTPUT`: applies the files in the folder LORAS to
ComfyUI's models, for test_host_lora.py."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from inside_lora_training import training
from safetensors.torch import load_file, save_file
from torch import Tensor

from tools.comfyui.in_host import load_pack, write_results

WEIGHT = "blocks.2.attention.to_q.weight"
# Chains of LoRAs: file, strength of the model and of the CLIP.
RUNS: dict[str, tuple[tuple[str, float, float], ...]] = {
    "golden": (("golden", 1.0, 1.0),),
    "trained": (("trained", 1.0, 1.0),),
    "stacked": (("diffusers", 1.0, 1.0), ("other", -0.5, 2.0)),
    "there and back": (("diffusers", 3.0, 3.0), ("diffusers", -3.0, -3.0)),
    "model only": (("diffusers", 1.0, 0.0),),
    "clip only": (("diffusers", 0.0, 1.0),),
    "loha": (("loha", 0.5, 0.0),),
    "lokr": (("lokr", 0.5, 0.0),),
}
STRENGTH = 0.7  # of the files in every format
STORED = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}


class Log(logging.Handler):
    """Keeps the warnings of the log."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def outputs(model: Any, clip: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Returns the patched network's prediction and the patched text encoder's states, then restores the weights."""
    import comfy.model_management

    comfy.model_management.load_models_gpu([model])
    noise = model.model.diffusion_model(*inputs)
    model.detach()
    [[states, _]] = clip.encode_from_tokens_scheduled(clip.tokenize("a red apple"))
    return noise, states


def randomised(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns tensors with random contents, as if they had been trained; alphas stay."""
    draw = torch.Generator().manual_seed(7)
    return {
        key: x if key.endswith(".alpha") else torch.randn(x.shape, generator=draw) * 0.1 for key, x in state.items()
    }


def as_trained(model: Any, algorithm: str) -> dict[str, Tensor]:
    """Returns a file of ComfyUI's TrainLoraNode and SaveLoRA, with random contents."""
    from comfy.weight_adapter import adapter_maps

    state: dict[str, Tensor] = {}
    for name, module in model.model.named_modules():
        if hasattr(module, "weight_function") and module.weight is not None:
            if module.weight.ndim > 1:
                adapter = adapter_maps[algorithm].create_train(module.weight, rank=4, alpha=1.0)
                state |= {f"{name}.{key}": x.detach() for key, x in adapter.named_parameters()}
            else:
                state[f"{name}.diff"] = module.weight
            if module.bias is not None:
                state[f"{name}.diff_b"] = module.bias
    return randomised(state)


def extracted(model: Any, clip: Any, kind: str, folder: Path) -> dict[str, Tensor]:
    """Returns a file of ComfyUI's LoraSave, of the differences to a MODEL and a CLIP (or None) with other weights."""
    import folder_paths
    from comfy_extras.nodes_lora_extract import LoraSave
    from comfy_extras.nodes_model_merging import CLIPSubtract, ModelSubtract

    def changed(patcher: Any) -> None:
        random = randomised({key: weight for key, ((weight, _), *_) in patcher.get_key_patches().items()})
        patcher.add_patches({key: ("diff", (x,)) for key, x in random.items() if x.any()})

    changed(other := model.clone())
    [model_difference], clip_difference = ModelSubtract().merge(other, model, 1.0), None
    if clip is not None:
        changed((other := clip.clone()).patcher)
        [clip_difference] = CLIPSubtract().merge(other, clip, 1.0)
    folder_paths.set_output_directory(str(folder))
    LoraSave.execute(kind, 8, kind, True, model_difference, clip_difference)
    return load_file(next(folder.glob(f"{kind}_*.safetensors")))


def written_by_others() -> dict[str, dict[str, Tensor]]:
    """Returns files of LyCORIS, PEFT and Kohya with random contents, for the golden prior."""
    linear, conv, gamma = "blocks.2.attention.to_q", "blocks.0.depthwise", "blocks.0.channelwise.2.gamma"
    lora = {"lora_up.weight": (64, 2), "lora_down.weight": (2, 64)}
    tucker = {"lora_up.weight": (64, 2, 1, 1), "lora_down.weight": (2, 1, 1, 1), "lora_mid.weight": (2, 2, 3, 3)}
    cores = {f"hada_{name}": (2, 2, 3, 3) for name in ("t1", "t2")}
    loha = {f"hada_{name}": size for name, size in (("w1_a", (2, 64)), ("w1_b", (2, 1)))}
    loha |= {name.replace("w1", "w2"): size for name, size in loha.items()} | cores
    bias = {"diff_b": (64,)}
    files: dict[str, dict[str, dict[str, tuple[int, ...]]]] = {
        "tucker lora": {conv: tucker},
        "tucker loha": {conv: loha},
        "dora of rows": {linear: lora | {"dora_scale": (64, 1)}, conv: tucker | {"dora_scale": (64, 1, 1, 1)} | bias},
        "dora of columns": {linear: lora | {"dora_scale": (1, 64)}},
        "new values": {linear: {"set_weight": (64, 64)}, conv: bias, gamma: {"set_weight": (1, 1, 1, 256)}},
        "norms": {linear: {"w_norm": (64, 64), "b_norm": (64,)}, gamma: {"diff": (1, 1, 1, 256)}},
        "free oft": {linear: {"oft_blocks": (8, 8, 8)}},
    }
    states = {
        name: {f"{path}.{key}": torch.ones(size) for path, sizes in file.items() for key, size in sizes.items()}
        for name, file in files.items()
    }
    states = {name: {f"diffusion_model.{key}": x for key, x in state.items()} for name, state in states.items()}
    for state in states.values():  # alphas of 1 for all but OFT
        state |= {
            key.replace("lora_up.weight", "alpha"): torch.tensor(1.0) for key in state if key.endswith("lora_up.weight")
        }
    states = {name: randomised(state) for name, state in states.items()}
    states["limited oft"] = states["free oft"] | {f"diffusion_model.{linear}.alpha": torch.tensor(0.5)}
    return states


def patched(patcher: Any) -> dict[str, Tensor]:
    """Returns the weights that ComfyUI computes for the patches of a MODEL or a CLIP."""
    from comfy.lora import calculate_weight

    return {
        key: calculate_weight(patches, weight.clone(), key)
        for key, ((weight, _), *patches) in patcher.get_key_patches().items()
        if patches
    }


def error_of(call: Any, *arguments: Any) -> str:
    """Returns the message of the ValueError that a call raises; "" if it raises none."""
    try:
        call(*arguments)
    except ValueError as error:
        return str(error)
    return ""


def main(bundle: str, folder: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    import comfy.hooks
    import comfy.model_management
    import comfy.sd

    load_pack()
    from pack.nodes.host import lora, models
    from pack.nodes.host.clip import load_clip
    from pack.wuerstchen_core.checkpoints import read_part
    from pack.wuerstchen_core.checkpoints.open import open_part

    tensors: dict[str, Tensor] = {}
    facts: dict[str, Any] = {}
    logging.getLogger().addHandler(log := Log())
    part = read_part(bundle, "prior")
    prior, clip = models.load_model(part), load_clip(read_part(bundle, "prior_text_encoder"))
    loras = Path(folder)
    tensors_in = load_file(loras / "inputs" / "prior.safetensors")
    inputs = tuple(tensors_in[name] for name in ("x", "t", "text"))
    runs = RUNS | {f"form/{file.stem}": ((file.stem, 1.0, 1.0),) for file in loras.glob("form *")}
    runs["text biases"] = (("text biases/adapter_model", 1.0, 0.5),)
    runs |= {x.name: ((f"{x.name}/adapter_model", 1.0, 0.0),) for x in loras.glob("peft *")}
    runs |= {x.stem: ((x.stem, 1.0, 1.0),) for x in loras.glob("kind *")}
    for name, steps in {"untouched": (), **runs}.items():
        model, text, start = prior, clip, len(log.lines)
        for file, *strengths in steps:
            model, text, _ = lora.apply_lora(model, text, loras / f"{file}.safetensors", *strengths)
        tensors[f"{name}/noise"], tensors[f"{name}/states"] = outputs(model, text, inputs)
        facts[name] = [model is prior, text is clip, log.lines[start:]]

    decoder = models.load_model(read_part(bundle, "decoder"))
    files = {f"trained {name}": as_trained(prior, name) for name in ("LoRA", "LoHa", "LoKr", "OFT")}
    files |= {"stage b LoRA": as_trained(decoder, "LoRA")} | written_by_others()
    with tempfile.TemporaryDirectory() as temporary:
        # ComfyUI takes minutes for factors of the token embedding.
        pairs = (("standard", None), ("full_diff", clip))
        files |= {kind: extracted(prior, changed, kind, Path(temporary)) for kind, changed in pairs}
        for name, state in files.items():
            save_file({key: x.contiguous() for key, x in state.items()}, path := Path(temporary) / "file.safetensors")
            tensors |= {f"file/{name}/{key}": x for key, x in state.items()}
            model, start = decoder if name.startswith("stage b") else prior, len(log.lines)
            *ours, _ = lora.apply_lora(model, clip, path, STRENGTH, STRENGTH)
            lines = log.lines[start:]
            stock = comfy.sd.load_lora_for_models(model, clip, load_file(path), STRENGTH, STRENGTH)
            facts[f"file/{name}"] = [lines, log.lines[start + len(lines) :]]
            for kind, pair in (("ours", ours), ("stock", stock)):
                weights = patched(pair[0]) | patched(pair[1].patcher)
                tensors |= {f"{kind}/{name}/{key}": x for key, x in weights.items()}
            if name == "norms":  # GRN's parameters are in no layer of ComfyUI's
                tensors[f"{name}/noise"], _ = outputs(*ours, inputs)

    for file in loras.glob("kind *"):
        name, start = f"{file.stem} in stock", len(log.lines)
        stock = comfy.sd.load_lora_for_models(prior, clip, load_file(file), 1.0, 1.0)
        tensors[f"{name}/noise"], tensors[f"{name}/states"] = outputs(*stock, inputs)
        facts[name] = log.lines[start:]

    # A trained file in the functions of ComfyUI's LoraLoader and CreateHookLora.
    state, start = load_file(loras / "trained.safetensors"), len(log.lines)
    stock = comfy.sd.load_lora_for_models(prior, clip, state, 1.0, 1.0)
    tensors["trained in stock/noise"], tensors["trained in stock/states"] = outputs(*stock, inputs)
    hooks, model = comfy.hooks.create_hook_lora(state, 1.0, 1.0), prior.clone()
    model.register_all_hook_patches(hooks, comfy.hooks.create_target_dict(comfy.hooks.EnumWeightTarget.Model))
    comfy.model_management.load_models_gpu([model])
    model.patch_hooks(hooks)
    tensors["hook/noise"] = model.model.diffusion_model(*inputs)
    model.unpatch_hooks()
    model.detach()
    facts["trained in stock"] = log.lines[start:]

    # The converted file in the function of ComfyUI's LoraLoader and LoraLoaderModelOnly.
    _, _, state = lora.apply_lora(prior, clip, loras / "diffusers.safetensors", 1.0, 1.0)
    converted = lora.write_converted(loras / "diffusers.safetensors", state, loras)
    facts["converted"] = [converted.name, len(log.lines)]
    stock = comfy.sd.load_lora_for_models(prior, clip, load_file(converted), 1.0, 1.0)
    tensors["stock/noise"], tensors["stock/states"] = outputs(*stock, inputs)
    facts["stock"] = log.lines[facts["converted"][1] :]
    again = (
        converted.stat().st_mtime_ns,
        lora.write_converted(loras / "diffusers.safetensors", state, loras) == converted,
    )
    facts["written once"] = [converted.stat().st_mtime_ns == again[0], again[1]]
    save_file({"other": torch.zeros(1)}, converted)
    facts["different file"] = error_of(lora.write_converted, loras / "diffusers.safetensors", state, loras)

    for name, dtype in STORED.items():
        comfy.model_management.unet_dtype, chosen = (lambda dtype=dtype, **_: dtype), comfy.model_management.unet_dtype
        stored = models.load_model(part)
        comfy.model_management.unet_dtype = chosen
        weight = stored.model.diffusion_model.get_parameter(WEIGHT)
        tensors[f"{name}/before"] = weight.detach().float()
        model, _, _ = lora.apply_lora(stored, None, loras / "diffusers.safetensors", 1.0, 1.0)
        comfy.model_management.load_models_gpu([model])
        weight = model.model.diffusion_model.get_parameter(WEIGHT)
        facts[name] = str(weight.dtype)
        tensors[f"{name}/after"] = weight.detach().float()
        tensors[f"{name}/noise"] = model.model.diffusion_model(*inputs).float()

    start = len(log.lines)
    lora.apply_lora(prior, None, loras / "mixed.safetensors", 1.0, 1.0)
    facts["mixed"] = log.lines[start:]
    header = {"distillation": "{}", "sampling": '{"schedule": "turbo", "prior_steps": 2, "prior_guidance": 1.0}'}
    save_file(load_file(loras / "diffusers.safetensors"), loras / "distilled.safetensors", header)
    for name, strength in (("distilled", 1.0), ("distilled at 0", 0.0)):
        start = len(log.lines)
        lora.apply_lora(prior, None, loras / "distilled.safetensors", strength, 1.0)
        facts[name] = log.lines[start:]
    facts["to the decoder"] = error_of(lora.apply_lora, decoder, None, loras / "diffusers.safetensors", 1.0, 1.0)
    other = load_clip(read_part(bundle, "decoder_text_encoder"))
    facts["with the other clip"] = error_of(lora.apply_lora, prior, other, loras / "diffusers.safetensors", 1.0, 1.0)
    keys = [f"clip_{name}.transformer.text_model.final_layer_norm.weight" for name in "lg"]
    two = SimpleNamespace(cond_stage_model=SimpleNamespace(state_dict=lambda: dict.fromkeys(keys)))
    facts["two text encoders"] = error_of(lora.apply_lora, prior, two, loras / "diffusers.safetensors", 1.0, 1.0)
    no_stage = SimpleNamespace(model=torch.nn.Identity())
    facts["another model"] = error_of(lora.apply_lora, no_stage, None, loras / "diffusers.safetensors", 1.0, 1.0)
    facts["text alone"] = error_of(lora.apply_lora, prior, None, loras / "text.safetensors", 1.0, 1.0)
    trained, facts["training"] = training({name: open_part(bundle, name) for name in ("prior", "decoder")})
    return tensors | trained, facts


if __name__ == "__main__":
    write_results(main)
