"""Run by ComfyUI's Python, `inside_lora.py COMFYUI BUNDLE LORAS OUTPUT`: applies the files in the folder LORAS to
ComfyUI's models, for test_host_lora.py."""

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


def error_of(call: Any, *arguments: Any) -> str:
    """Returns the message of the ValueError that a call raises; "" if it raises none."""
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
    tensors_in = load_file(loras / "inputs" / "prior.safetensors")
    inputs = tuple(tensors_in[name] for name in ("x", "t", "text"))
    runs = RUNS | {f"form/{file.stem}": ((file.stem, 1.0, 1.0),) for file in loras.glob("form *")}
    for name, steps in {"untouched": (), **runs}.items():
        model, text, start = prior, clip, len(log.lines)
        for file, *strengths in steps:
            model, text, _ = lora.apply_lora(model, text, loras / f"{file}.safetensors", *strengths)
        tensors[f"{name}/noise"], tensors[f"{name}/states"] = outputs(model, text, inputs)
        facts[name] = [model is prior, text is clip, log.lines[start:]]

    # The converted file in the function of ComfyUI's LoraLoader and LoraLoaderModelOnly.
    _, _, state = lora.apply_lora(prior, clip, loras / "diffusers.safetensors", 1.0, 1.0)
    converted = lora.write_converted(loras / "diffusers.safetensors", state)
    facts["converted"] = [converted.name, len(log.lines)]
    stock = comfy.sd.load_lora_for_models(prior, clip, load_file(converted), 1.0, 1.0)
    tensors["stock/noise"], tensors["stock/states"] = outputs(*stock, inputs)
    facts["stock"] = log.lines[facts["converted"][1] :]
    again = converted.stat().st_mtime_ns, lora.write_converted(loras / "diffusers.safetensors", state) == converted
    facts["written once"] = [converted.stat().st_mtime_ns == again[0], again[1]]
    save_file({"other": torch.zeros(1)}, converted)
    facts["different file"] = error_of(lora.write_converted, loras / "diffusers.safetensors", state)

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
    decoder = models.load_model(read_part(bundle, "decoder"))
    facts["to the decoder"] = error_of(lora.apply_lora, decoder, None, loras / "diffusers.safetensors", 1.0, 1.0)
    other = load_clip(read_part(bundle, "decoder_text_encoder"))
    facts["with the other clip"] = error_of(lora.apply_lora, prior, other, loras / "diffusers.safetensors", 1.0, 1.0)
    keys = [f"clip_{name}.transformer.text_model.final_layer_norm.weight" for name in "lg"]
    two = SimpleNamespace(cond_stage_model=SimpleNamespace(state_dict=lambda: dict.fromkeys(keys)))
    facts["two text encoders"] = error_of(lora.apply_lora, prior, two, loras / "diffusers.safetensors", 1.0, 1.0)
    no_stage = SimpleNamespace(model=torch.nn.Identity())
    facts["another model"] = error_of(lora.apply_lora, no_stage, None, loras / "diffusers.safetensors", 1.0, 1.0)
    facts["text alone"] = error_of(lora.apply_lora, prior, None, loras / "text.safetensors", 1.0, 1.0)
    return tensors, facts


if __name__ == "__main__":
    write_results(main)
