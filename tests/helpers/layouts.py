"""Writes our networks' weights in the layouts of other programs, as the published files have them."""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from helpers.golden_data import manifests
from wuerstchen_core.models.decoder import Decoder, DecoderParams
from wuerstchen_core.models.image_encoder import ImageEncoder, ImageEncoderParams
from wuerstchen_core.models.prior import Prior, PriorParams
from wuerstchen_core.models.token_decoder import TokenDecoder, TokenDecoderParams

State = dict[str, Tensor]

# The released networks' number of blocks, at the smallest width that their heads allow.
PRIOR = PriorParams(c=64, c_cond=1280, c_r=8, nhead=1)
FIRST_PRIOR = PriorParams(c=64, c_cond=1024, c_r=8, nhead=1)  # of v1, and of v2's first upload
DECODER = DecoderParams(c_hidden=(8, 64, 64, 64), nhead=(-1, 1, 1, 1), c_cond=8, clip_embd=1024, c_r=8)
TOKENS = TokenDecoderParams(c_hidden=(8, 16, 16), c_in=8, c_out=8, num_labels=32, c_cond=8, byt5_embd=1024, c_r=8)


def manifest_keys(name: str) -> set[str]:
    """Returns the keys of a published file."""
    return set(manifests()[name]["tensors"])


def write_folder(folder: Path, state: State, config: dict[str, Any], name: str = "diffusion_pytorch_model") -> None:
    """Writes a component of diffusers."""
    folder.mkdir(parents=True)
    save_file(state, folder / f"{name}.safetensors")
    (folder / "config.json").write_text(json.dumps(config))


class Payload:
    """Creates a folder when it is unpickled."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


def random_state(network: nn.Module, seed: int = 0) -> State:
    """Returns random weights of the network's shapes."""
    generator = torch.Generator().manual_seed(seed)
    return {
        key: torch.randn(x.shape, generator=generator) if x.is_floating_point() else x
        for key, x in network.state_dict().items()
    }


def stage_states() -> dict[str, State]:
    """Returns weights of Stages C and B of both releases, and of v2's first prior."""
    return {
        "prior": random_state(Prior(PRIOR)),
        "first_prior": random_state(Prior(FIRST_PRIOR)),
        "decoder": random_state(Decoder(DECODER)),
        "token_decoder": random_state(TokenDecoder(TOKENS)),
    }


def original(state: State) -> State:
    """Maps our Prior or Decoder to the original's names, with one projection for q, k and v."""
    out: State = {}
    for key, x in state.items():
        if ".attention.to_q." in key:
            trio = [state[key.replace("to_q", name)] for name in ("to_q", "to_k", "to_v")]
            out[key.replace("attention.to_q.", "attention.attn.in_proj_")] = torch.cat(trio)
        elif ".attention.to_out.0." in key:
            out[key.replace("attention.to_out.0.", "attention.attn.out_proj.")] = x
        elif ".attention." not in key:
            out[key] = x
    return out


def comfyui(state: State) -> State:
    """Maps our Prior or Decoder to the keys of ComfyUI's ModelSave."""
    return {f"model.diffusion_model.{key}": x for key, x in state.items()}


def vae_save(state: State) -> State:
    """Maps our VQGAN or image encoder to the keys of ComfyUI's VAESave."""
    return {f"encoder.{key}": x for key, x in state.items()} if "backbone.0.0.weight" in state else state


def stage_c_previewer(levels: int) -> State:
    """Returns Würstchen's Stage C previewer (4x, two levels) or Stable Cascade's (8x, three), with one channel."""
    layers: list[nn.Module] = [nn.Conv2d(16, 1, 1), nn.GELU(), nn.BatchNorm2d(1)]
    layers += [nn.Conv2d(1, 1, 3), nn.GELU(), nn.BatchNorm2d(1)]
    for _ in range(levels):
        layers += [nn.ConvTranspose2d(1, 1, 2), nn.GELU(), nn.BatchNorm2d(1)]
        layers += [nn.Conv2d(1, 1, 3), nn.GELU(), nn.BatchNorm2d(1)]
    return {f"blocks.{key}": x for key, x in nn.Sequential(*layers, nn.Conv2d(1, 3, 1)).state_dict().items()}


def vqgan_of_diffusers(state: State) -> State:
    """Maps our VQGAN to the keys of diffusers' PaellaVQModel."""
    return {key.replace("codebook", "embedding"): x for key, x in state.items()}


@cache
def encoder_state(params: ImageEncoderParams | None = None) -> State:
    """Returns an image encoder (default: v2) whose tensors repeat one number, which PyTorch stores once."""
    with torch.device("meta"):
        network = ImageEncoder(params or ImageEncoderParams())
    shapes = {key: (x.shape, x.dtype) for key, x in network.state_dict().items()}
    return {key: torch.tensor(i, dtype=dtype).expand(shape) for i, (key, (shape, dtype)) in enumerate(shapes.items())}


def clip_of_transformers(width: int, layers: int, vocab_size: int = 49408, prefix: str = "text_model.") -> State:
    """Returns a random CLIPTextModelWithProjection; its text model's keys start with `prefix`."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=width * 4,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        projection_dim=width,
        hidden_act="gelu",
    )
    state = CLIPTextModelWithProjection(config).state_dict()
    return {
        prefix + key.removeprefix("text_model.") if "text_projection" not in key else key: x for key, x in state.items()
    }


def clip_of_open_clip(width: int, layers: int) -> State:
    """Returns a random CLIP of open_clip, including the vision tower."""
    from open_clip.model import CLIP

    vision = {"layers": 1, "width": 64, "patch_size": 16, "image_size": 32}
    return CLIP(width, vision, {"width": width, "heads": width // 64, "layers": layers}).state_dict()
