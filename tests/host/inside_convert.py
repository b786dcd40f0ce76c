"""Run by ComfyUI's Python, `inside_convert.py COMFYUI FOLDER OUTPUT`: files of `convert` in ComfyUI's loaders and in
ours, and our VAE objects saved by ComfyUI."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tools.comfyui.in_host import load_pack, seeded, write_results

LATENTS = (1, 4, 8, 12)
CALL = ((2, 4, 16, 24), (2, 16, 2, 3), (2, 7, 24))  # of the decoder: latents, features, text


def calls() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, features, text = (seeded(*shape) for shape in CALL)
    return x, torch.tensor([0.3, 0.9]), features, text


def main(folder: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    load_pack()
    import comfy.sd
    import comfy.utils
    from pack.nodes.host import models, vae
    from pack.wuerstchen_core.checkpoints import read_part
    from pack.wuerstchen_core.models.text_encoder import CLIP_BIGG, CLIP_H, TextEncoder

    tensors: dict[str, Tensor] = {}
    stock = comfy.sd.VAE(sd=comfy.utils.load_torch_file(f"{folder}/released/vqgan.safetensors"))
    tensors["stage_a"] = stock.first_stage_model.decode(seeded(*LATENTS).to(stock.vae_dtype)).float()
    facts: dict[str, Any] = {"stage_a": type(stock.first_stage_model).__name__}
    for name, params in (("CLIP_H", CLIP_H), ("CLIP_G", CLIP_BIGG)):
        with torch.device("meta"):
            state = TextEncoder(params).state_dict()
        zeros = {key: torch.zeros(()).expand(x.shape) for key, x in state.items()}
        converted = comfy.utils.clip_text_transformers_convert(zeros, "", "")
        facts[name] = comfy.sd.detect_te_model(converted).name
    x, t, features, text = (value.to(torch.float32) for value in calls())
    for dtype, file in (("fp8", "tiny/decoder"), ("int8", "int8")):
        network = models.load_model(read_part(f"{folder}/{file}.safetensors", "decoder")).model.diffusion_model
        facts[dtype] = str(next(network.parameters()).dtype)
        tensors[dtype] = network.float()(x, t, context=text, stable_cascade_prior=features)
    for part, load in (("vqgan", vae.load_stage_a), ("image_encoder", vae.load_image_encoder)):
        saved = load(read_part(f"{folder}/tiny/{part}.safetensors", part)).get_sd()
        comfy.utils.save_torch_file({key: x.contiguous() for key, x in saved.items()}, f"{folder}/{part}.safetensors")
    return tensors, facts


if __name__ == "__main__":
    write_results(main)
