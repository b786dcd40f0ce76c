"""Writes one LoRA in the key names of every program that writes such files."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

RANK, ALPHA = 4, 2.0
PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")

Factors = Mapping[str, tuple[Tensor, Tensor]]  # up [out, rank] and down [rank, in] by module path


def random_factors(paths: Mapping[str, tuple[int, int]], seed: int = 0) -> Factors:
    """Returns random factors for modules with weights [out, in]."""
    generator = torch.Generator().manual_seed(seed)
    return {
        path: (
            torch.randn(rows, RANK, generator=generator) * 0.1,
            torch.randn(RANK, columns, generator=generator) * 0.1,
        )
        for path, (rows, columns) in paths.items()
    }


def attention_of_prior(width: int = 64) -> dict[str, tuple[int, int]]:
    """Returns the weight shapes of the attention layers in the tests' priors, which have two blocks."""
    return {f"blocks.{i}.attention.{name}": (width, width) for i in (2, 5) for name in PROJECTIONS}


def attention_of_tower(width: int) -> dict[str, tuple[int, int]]:
    """Returns the weight shapes of the attention layers in a text tower's first block."""
    return {f"encoder.layers.0.self_attn.{name}_proj": (width, width) for name in ("q", "k", "v", "out")}


def _flat(path: str) -> str:
    return path.replace(".", "_")


def _processor(path: str) -> str:
    path = path.replace(".attention.", ".attention.processor.").removesuffix(".0")
    return re.sub(r"self_attn\.(q|k|v|out)_proj", r"self_attn.to_\1", path)


@dataclass(frozen=True)
class Form:
    """A naming: prefixes of the network's and the text tower's paths, and how paths and tensors are written."""

    network: str
    text: str
    down: str = ".lora_down.weight"
    up: str = ".lora_up.weight"
    alpha: bool = True  # False: it is multiplied into `up`
    path: Callable[[str], str] = str

    def write(self, network: Factors, text: Factors) -> dict[str, Tensor]:
        state: dict[str, Tensor] = {}
        for prefix, factors in ((self.network, network), (self.text, text)):
            for path, (up, down) in factors.items():
                name = prefix + self.path(path)
                state[name + self.down] = down.clone()
                state[name + self.up] = up.clone() if self.alpha else up * (ALPHA / RANK)
                if self.alpha:
                    state[f"{name}.alpha"] = torch.tensor(ALPHA)
        return state


_AB = {"down": ".lora_A.weight", "up": ".lora_B.weight"}
_TE = "text_encoder.text_model."

FORMS = {
    "diffusers": Form("prior.", _TE, **_AB, alpha=False),
    "diffusers with linear layers": Form(
        "prior.", _TE, ".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight", alpha=False
    ),
    "diffusers 2023": Form("prior.", _TE, "_lora.down.weight", "_lora.up.weight", alpha=False, path=_processor),
    "peft": Form("base_model.model.", "text_encoder.", ".lora_A.default.weight", ".lora_B.default.weight", alpha=False),
    "unet": Form("unet.", _TE, ".lora.down.weight", ".lora.up.weight"),
    "bare": Form("", "text_model.", **_AB),
    "onetrainer diffusers": Form("prior.", "text_encoder.", **_AB, alpha=False),
    "onetrainer backup": Form("prior.", _TE),
    "onetrainer kohya": Form("lora_unet_", "lora_te_text_model_", path=_flat),
    "onetrainer kohya, later towers": Form("lora_unet_", "lora_te_", path=_flat),
    "onetrainer 2025": Form("lora_prior_unet.", "lora_prior_te.text_model."),
    "onetrainer 2024": Form("lora_prior_unet_", "lora_prior_te_text_model_", path=_flat),
    "onetrainer 2023": Form("lora_prior_prior_", "lora_prior_te_text_model_", path=_flat),
    "kohya": Form("lora_unet_", "lora_te1_text_model_", path=_flat),
    "comfyui": Form("diffusion_model.", "text_encoders.clip_g.transformer.text_model.", **_AB),
    "comfyui, whole keys": Form("model.diffusion_model.", "clip_g.transformer.text_model.", **_AB),
}
