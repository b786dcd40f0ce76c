"""Maps other projects' key names to ours, one pure function per format, and recognises files of other models."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch

from ..models.text_encoder import END, TextEncoderParams
from .lazy import AnyTensor, apply_to_rows

COMFYUI_PREFIX = "model.diffusion_model."  # keys of ComfyUI's ModelSave
COMFYUI_CLIPS = {"prior": "clip_g", "decoder": "clip_h"}  # ComfyUI's name of each stage's text tower

LORA = "a LoRA, which changes a model and is not a model itself"
_EMBEDDING = "a textual inversion embedding, which prompts name as embedding:NAME"
_VECTORS = {"clip_g", "clip_h", "clip_l", "emb_params"}
_PREVIEWER = "the Stage C previewer of v2, which this project does not use"
_CASCADE = "a Stable Cascade model, whose latents differ from Würstchen's"
_DIFFUSION = "a Stable Diffusion model"
_CONTROL_NET = "a ControlNet of another model, which cannot steer Würstchen"
_VAE = "a VAE of the Stable Diffusion kind"

# Parts of keys that occur in other projects' files and never in ours.
FOREIGN: tuple[tuple[str, str], ...] = (
    ("lora_", LORA),
    ("_lora.", LORA),
    ("hada_w", LORA),
    ("lokr_w", LORA),
    ("oft_blocks", LORA),
    (".diff_b", LORA),
    ("clip_txt_", _CASCADE),
    ("pixels_mapper.", _CASCADE),
    ("zero_convs.", _CONTROL_NET),
    ("controlnet_", _CONTROL_NET),
    ("projections.0.0.", _CONTROL_NET),  # Stable Cascade's
    ("lllite_", _CONTROL_NET),
    ("input_blocks.", _DIFFUSION),
    ("encoder.down.0.block.", _VAE),
    ("encoder.down_blocks.", _VAE),
    ("blocks.0.resnets.", _DIFFUSION),
    ("joint_blocks.", _DIFFUSION),
    ("double_blocks.", "a Flux model"),
    ("encoder.block.0.layer.", "a T5 text encoder"),
)

# A text tower's keys in open_clip (ours) and in transformers, where q, k and v are separate tensors.
_TEXT_KEYS = (
    ("token_embedding.", "embeddings.token_embedding."),
    ("positional_embedding", "embeddings.position_embedding.weight"),
    ("ln_final.", "final_layer_norm."),
    ("transformer.resblocks.", "encoder.layers."),
    (".ln_1.", ".layer_norm1."),
    (".ln_2.", ".layer_norm2."),
    (".mlp.c_fc.", ".mlp.fc1."),
    (".mlp.c_proj.", ".mlp.fc2."),
    *((f".attn.{name}_proj.", f".self_attn.{name}_proj.") for name in ("q", "k", "v", "out")),
)
_TEXT_PREFIXES = ("positional_embedding", "token_embedding.", "transformer.", "ln_final.", "cls_emb")
_UNUSED_TEXT_KEYS = ("embeddings.position_ids", "text_projection.weight", "logit_scale")
_IN_PROJ = re.compile(r"(.+\.attn\.)in_proj_(weight|bias)")
_Q_PROJ = re.compile(r"(.+\.attn\.)q_proj\.(weight|bias)")


def foreign(keys: Iterable[str]) -> str | None:
    """Returns what other model the keys belong to; None if they are unknown or may be Würstchen's."""
    keys = list(keys)
    for mark, name in FOREIGN:
        if any(mark in key for key in keys):
            return name
    if keys and all(key in _VECTORS or key.startswith(("bundle_emb.", "<")) for key in keys):
        return _EMBEDDING
    if "mapper.1.running_mean" in keys and "mapper.1.weight" not in keys:  # its batch norm has no affine parameters
        return _CASCADE
    if "blocks.18.weight" in keys and "blocks.2.running_mean" in keys:
        return _PREVIEWER if "blocks.24.weight" not in keys else _CASCADE  # Cascade's previewer has one level more
    return None


def strip_prefix(state: dict[str, AnyTensor], prefix: str) -> dict[str, AnyTensor]:
    """Returns the tensors whose keys start with `prefix`, without the prefix."""
    return {key.removeprefix(prefix): x for key, x in state.items() if key.startswith(prefix)}


def split_attention(state: dict[str, AnyTensor]) -> dict[str, AnyTensor]:
    """Maps the original Prior and DiffNeXt: `nn.MultiheadAttention` becomes to_q, to_k, to_v and to_out.0."""

    def rename(key: str) -> str:
        key = key.replace("attention.attn.out_proj.", "attention.to_out.0.")
        return re.sub(r"attention\.attn\.([qkv])_proj\.", r"attention.to_\1.", key)

    return {rename(key): x for key, x in _unpack(state).items()}


def pack_attention(state: dict[str, AnyTensor]) -> dict[str, AnyTensor]:
    """Maps a TokenDecoder whose projections are separate, as in int8: the inverse of `split_attention`."""

    def rename(key: str) -> str:
        key = key.replace("attention.to_out.0.", "attention.attn.out_proj.")
        return re.sub(r"attention\.to_([qkv])\.", r"attention.attn.\1_proj.", key)

    return _pack({rename(key): x for key, x in state.items()})


def _unpack(state: dict[str, AnyTensor]) -> dict[str, AnyTensor]:
    """Splits each packed projection, such as attn.in_proj_weight, into its thirds: attn.q_proj.weight, k and v."""
    out: dict[str, AnyTensor] = {}
    for key, x in state.items():
        if found := _IN_PROJ.fullmatch(key):
            for index, name in enumerate("qkv"):
                out[f"{found[1]}{name}_proj.{found[2]}"] = _third(x, index)
        else:
            out[key] = x
    return out


def _third(x: AnyTensor, index: int) -> AnyTensor:
    """Returns the rows of q (index 0), k (1) or v (2) of a packed projection."""
    return apply_to_rows(lambda packed: packed.tensor_split(3)[index], x, rows=(x.shape[0] + 2 - index) // 3)


def _pack(state: dict[str, AnyTensor]) -> dict[str, AnyTensor]:
    """Joins the projections attn.q_proj.weight, k and v of each layer, where it has all three."""
    out = dict(state)
    for key in state:
        trio = [key.replace("q_proj", f"{name}_proj") for name in "qkv"]
        if (found := _Q_PROJ.fullmatch(key)) and all(name in state for name in trio):
            out[f"{found[1]}in_proj_{found[2]}"] = _whole([out.pop(name) for name in trio])
    return out


def _whole(parts: list[AnyTensor]) -> AnyTensor:
    """Concatenates the rows of q, k and v. Raises ValueError if they differ in width or dtype."""
    if len({(tuple(x.shape[1:]), x.dtype) for x in parts}) > 1:
        shapes = ", ".join(f"{list(x.shape)} {str(x.dtype).removeprefix('torch.')}" for x in parts)
        raise ValueError(f"q, k and v of a layer differ ({shapes}): download the file again")
    return apply_to_rows(lambda *rows: torch.cat(rows), *parts, rows=sum(x.shape[0] for x in parts))


def vqgan_from_diffusers(state: dict[str, AnyTensor]) -> dict[str, AnyTensor]:
    """Maps diffusers' PaellaVQModel, whose codebook has another key."""
    return {key.replace("vquantizer.embedding.", "vquantizer.codebook."): x for key, x in state.items()}


def vqgan_key_to_diffusers(key: str) -> str:
    """Returns diffusers' name of a VQGAN's key; keys of other networks are the same in diffusers."""
    return key.replace("vquantizer.codebook.", "vquantizer.embedding.")


def text_from_any(state: dict[str, AnyTensor]) -> dict[str, AnyTensor]:
    """Maps a CLIP text tower of open_clip or transformers, alone or in a whole CLIP model, without its projection."""
    if any(key.endswith("embeddings.token_embedding.weight") for key in state):
        return text_from_transformers(state)
    own = strip_prefix(state, "text.") if "text.token_embedding.weight" in state else state
    return {key: x for key, x in own.items() if key.startswith(_TEXT_PREFIXES)}


def text_from_transformers(state: dict[str, AnyTensor]) -> dict[str, AnyTensor]:
    """Maps transformers' CLIPTextModel, or the text half of its CLIPModel, to open_clip's names.

    Unknown keys stay, so that strict loading names them.
    """
    own = strip_prefix(state, "text_model.") or state
    renamed: dict[str, AnyTensor] = {}
    for key, x in own.items():
        if key not in _UNUSED_TEXT_KEYS:
            for ours, theirs in _TEXT_KEYS:
                key = key.replace(theirs, ours)
            renamed[key] = x
    return _pack(renamed)


def text_config(params: TextEncoderParams) -> dict[str, Any]:
    """Returns a text tower's params under transformers' names, as in config.json."""
    return {
        "hidden_size": params.width,
        "intermediate_size": int(params.width * params.mlp_ratio),
        "num_attention_heads": params.heads,
        "num_hidden_layers": params.layers,
        "max_position_embeddings": params.context_length,
        "vocab_size": params.vocab_size,
        "hidden_act": "gelu",
        "eos_token_id": END,
    }


def text_to_transformers(state: dict[str, AnyTensor]) -> dict[str, AnyTensor]:
    """Maps a text tower to transformers' names, without the prefix `text_model.`."""
    return {_text_key_to_transformers(key): x for key, x in _unpack(state).items()}


def _text_key_to_transformers(key: str) -> str:
    for ours, theirs in _TEXT_KEYS:
        key = key.replace(ours, theirs)
    return key


def transformers_path(path: str) -> str:
    """Returns transformers' path of a module in a text tower's layers, without the prefix `text_model.`."""
    return _text_key_to_transformers(f"{path}.").removesuffix(".")
