"""Run by a ComfyUI's own Python, `inside_lora.py COMFYUI BUNDLE LORAS OUTPUT`: patches the host's models by the files
in the folder LORAS, and writes what test_host_lora.py compares with the core."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tools.comfyui.in_host import load_pack, write_results

WEIGHT = "blocks.2.attention.to_q.weight"
# What is loaded over the untouched models, one after the other: file, strength of the model and of the CLIP.
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
STORED = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}


class Log(logging.Handler):
    """Keeps what is written to the log."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def outputs(model: Any, clip: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """The patched network's noise and the patched tower's states; the host's weights are put back afterwards."""
    import comfy.model_management

    comfy.model_management.load_models_gpu([model])
    noise = model.model.diffusion_model(*inputs)
    model.detach()
    [[states, _]] = clip.encode_from_tokens_scheduled(clip.tokenize("a red apple"))
    return noise, states


def refused(call: Any, *arguments: Any) -> str:
    """The sentence of the ValueError that a call ends in."""
    try:
        call(*arguments)
    except ValueError as error:
        return str(error)
    return ""


def main(bundle: str, folder: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    import comfy.model_management
    import comfy.sd

    load_pack()
    from pack.nodes.host import lora, models
    from pack.nodes.host.clip import load_clip
    from pack.wuerstchen_core.checkpoints import read_part

    tensors: dict[str, Tensor] = {}
    facts: dict[str, Any] = {}
    logging.getLogger().addHandler(log := Log())
    part = read_part(bundle, "prior")
    prior, clip = models.load_model(part), load_clip(read_part(bundle, "prior_text_encoder"))
    loras = Path(folder)
    given = load_file(loras / "inputs" / "prior.safetensors")
    inputs = tuple(given[name] for name in ("x", "t", "text"))
    runs = RUNS | {f"form/{file.stem}": ((file.stem, 1.0, 1.0),) for file in loras.glob("form *")}
    for name, steps in {"untouched": (), **runs}.items():
        model, tower, left = prior, clip, len(log.lines)
        for file, *strengths in steps:
            model, tower, _ = lora.apply_lora(model, tower, loras / f"{file}.safetensors", *strengths)
        tensors[f"{name}/noise"], tensors[f"{name}/states"] = outputs(model, tower, inputs)
        facts[name] = [model is prior, tower is clip, log.lines[left:]]

    # ComfyUI's own way with the converted file, which is LoraLoader's and LoraLoaderModelOnly's.
    _, _, state = lora.apply_lora(prior, clip, loras / "diffusers.safetensors", 1.0, 1.0)
    converted = lora.write_converted(loras / "diffusers.safetensors", state)
    facts["converted"] = [converted.name, len(log.lines)]
    stock = comfy.sd.load_lora_for_models(prior, clip, load_file(converted), 1.0, 1.0)
    tensors["stock/noise"], tensors["stock/states"] = outputs(*stock, inputs)
    facts["stock"] = log.lines[facts["converted"][1] :]
    again = converted.stat().st_mtime_ns, lora.write_converted(loras / "diffusers.safetensors", state) == converted
    facts["written once"] = [converted.stat().st_mtime_ns == again[0], again[1]]
    save_file({"other": torch.zeros(1)}, converted)
    facts["not over another"] = refused(lora.write_converted, loras / "diffusers.safetensors", state)

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

    left = len(log.lines)
    lora.apply_lora(prior, None, loras / "mixed.safetensors", 1.0, 1.0)
    facts["mixed"] = log.lines[left:]
    decoder = models.load_model(read_part(bundle, "decoder"))
    facts["to the decoder"] = refused(lora.apply_lora, decoder, None, loras / "diffusers.safetensors", 1.0, 1.0)
    tower = load_clip(read_part(bundle, "decoder_text_encoder"))
    facts["with the other clip"] = refused(lora.apply_lora, prior, tower, loras / "diffusers.safetensors", 1.0, 1.0)
    keys = [f"clip_{name}.transformer.text_model.final_layer_norm.weight" for name in "lg"]
    two = SimpleNamespace(cond_stage_model=SimpleNamespace(state_dict=lambda: dict.fromkeys(keys)))
    facts["two towers"] = refused(lora.apply_lora, prior, two, loras / "diffusers.safetensors", 1.0, 1.0)
    other = SimpleNamespace(model=torch.nn.Identity())
    facts["another model"] = refused(lora.apply_lora, other, None, loras / "diffusers.safetensors", 1.0, 1.0)
    facts["text alone"] = refused(lora.apply_lora, prior, None, loras / "text.safetensors", 1.0, 1.0)
    return tensors, facts


if __name__ == "__main__":
    write_results(main)
