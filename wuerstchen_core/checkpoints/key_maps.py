"""Other projects' key names to ours: one pure function a format, and the marks by which a format is known."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import reduce

import torch

from .components import TEXT_ENCODER
from .lazy import AnyTensor, derived

COMFYUI_PREFIX = "model.diffusion_model."
COMFYUI_ENCODER = "encoder."  # of what VAESave writes of an image encoder

# A key that the format's files hold and no other's; checked after FOREIGN.
MARKS: tuple[tuple[str, str], ...] = (
    ("cond_mapper.0.weight", "prior"),
    ("clip_mapper.weight", "decoder"),
    ("byt5_mapper.weight", "token_decoder"),
    ("in_block.1.weight", "vqgan"),
    ("backbone.0.0.weight", "image_encoder"),
    ("token_embedding.weight", TEXT_ENCODER),
    ("text.token_embedding.weight", TEXT_ENCODER),
    ("embeddings.token_embedding.weight", TEXT_ENCODER),
    ("text_model.embeddings.token_embedding.weight", TEXT_ENCODER),
)

PREVIEWER = "the Stage C previewer of v2, a small picture of what a prior made, which nothing here needs"
LORA = "a LoRA, which changes a model and is none by itself"
_CASCADE = "a Stable Cascade model, whose latents are not Würstchen's"
_DIFFUSION = "a Stable Diffusion model"
_VAE = "a VAE of Stable Diffusion's kind"

# What part of a key gives away that the weights are somebody else's.
FOREIGN: tuple[tuple[str, str], ...] = (
    ("lora_", LORA),
    ("_lora.", LORA),
    ("clip_txt_", _CASCADE),
    ("pixels_mapper.", _CASCADE),
    ("input_blocks.", _DIFFUSION),
    ("encoder.down.0.block.", _VAE),
    ("encoder.down_blocks.", _VAE),
    ("blocks.0.resnets.", _DIFFUSION),
    ("joint_blocks.", _DIFFUSION),
    ("double_blocks.", "a Flux model"),
    ("encoder.block.0.layer.", "a T5 text encoder"),
)

_TRANSFORMERS_LAYER = {
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_OUR_LAYER = {ours: theirs for theirs, ours in _TRANSFORMERS_LAYER.items()}
_OUR_LAYER |= {f"attn.{name}_proj": f"self_attn.{name}_proj" for name in "qkv"}  # which are one tensor of ours
_TEXT_PREFIXES = ("positional_embedding", "token_embedding.", "transformer.", "ln_final.", "cls_emb")


def foreign(keys: Iterable[str]) -> str | None:
    """What the weights are, if they are known and not a part of Würstchen; else None."""
    keys = list(keys)
    for mark, name in FOREIGN:
        if any(mark in key for key in keys):
            return name
    if "mapper.1.running_mean" in keys and "mapper.1.weight" not in keys:  # its batch norm has no affine part
        return _CASCADE
    if "blocks.18.weight" in keys and "blocks.2.running_mean" in keys:
        return PREVIEWER if "blocks.24.weight" not in keys else _CASCADE  # whose previewer has one level more
    return None


def strip_comfyui(state: dict[str, AnyTensor]) -> dict[str, AnyTensor]:
    """ComfyUI's saved model: the network's keys without their prefix, nothing else."""
    return {key.removeprefix(COMFYUI_PREFIX): x for key, x in state.items() if key.startswith(COMFYUI_PREFIX)}


def strip_encoder(state: dict[str, AnyTensor]) -> dict[str, AnyTensor]:
    """An image encoder as ComfyUI's VAESave writes it: the network's keys without their prefix."""
    return {key.removeprefix(COMFYUI_ENCODER): x for key, x in state.items()}


def split_attention(state: dict[str, AnyTensor]) -> dict[str, AnyTensor]:
    """The original's Prior and DiffNeXt: `nn.MultiheadAttention` becomes to_q, to_k, to_v and to_out.0."""
    out: dict[str, AnyTensor] = {}
    for key, x in state.items():
        head, mark, tail = key.rpartition("attention.attn.")
        if mark and tail in ("in_proj_weight", "in_proj_bias"):
            for index, name in enumerate(("to_q", "to_k", "to_v")):
                out[f"{head}attention.{name}.{tail.removeprefix('in_proj_')}"] = _third(x, index)
        elif mark and tail.startswith("out_proj."):
            out[f"{head}attention.to_out.0.{tail.removeprefix('out_proj.')}"] = x
        else:
            out[key] = x
    return out


def _third(x: AnyTensor, index: int) -> AnyTensor:
    """The rows of the query, the key or the value."""
    shape = ((x.shape[0] + 2 - index) // 3, *x.shape[1:])
    return derived(shape, x.dtype, lambda whole: whole.tensor_split(3)[index], x)


def _joined(parts: list[AnyTensor]) -> AnyTensor:
    """Rows after rows."""
    shape = (sum(x.shape[0] for x in parts), *parts[0].shape[1:])
    dtype = reduce(torch.promote_types, (x.dtype for x in parts))
    return derived(shape, dtype, lambda *rows: torch.cat(rows), *parts)


def vqgan_from_diffusers(state: dict[str, AnyTensor]) -> dict[str, AnyTensor]:
    """diffusers' PaellaVQModel: the codebook's key."""
    return {key.replace("vquantizer.embedding.", "vquantizer.codebook."): x for key, x in state.items()}


def text_from_open_clip(state: dict[str, AnyTensor]) -> dict[str, AnyTensor]:
    """open_clip's CLIP: the text tower alone, whether it stands at the top or under `text.`; no projection."""
    prefix = "text." if "text.token_embedding.weight" in state else ""
    own = {key.removeprefix(prefix): x for key, x in state.items() if key.startswith(prefix)}
    return {key: x for key, x in own.items() if key.startswith(_TEXT_PREFIXES)}


def text_from_transformers(state: dict[str, AnyTensor]) -> dict[str, AnyTensor]:
    """transformers' CLIPTextModel, or the text half of its CLIPModel, in open_clip's names; no projection."""
    prefix = "text_model." if "text_model.embeddings.token_embedding.weight" in state else ""
    own = {key.removeprefix(prefix): x for key, x in state.items() if key.startswith(prefix)}
    dropped = ("embeddings.position_ids", "text_projection.weight", "logit_scale")
    out: dict[str, AnyTensor] = {}
    for key, x in own.items():
        if key == "embeddings.token_embedding.weight":
            out["token_embedding.weight"] = x
        elif key == "embeddings.position_embedding.weight":
            out["positional_embedding"] = x
        elif key.startswith("final_layer_norm."):
            out[key.replace("final_layer_norm.", "ln_final.")] = x
        elif key.startswith("encoder.layers."):
            _transformers_layer(key, own, out)
        elif key not in dropped:
            out[key] = x  # strict loading will name it
    return out


def text_to_transformers(state: dict[str, AnyTensor]) -> dict[str, AnyTensor]:
    """The layers of a text tower in transformers' names, without their prefix; the rest stays."""
    out: dict[str, AnyTensor] = {}
    for key, x in state.items():
        found = re.fullmatch(r"(transformer\.resblocks\.\d+)\.(.+)[._](weight|bias)", key)
        if found is None:
            out[key] = x
        elif found[2] == "attn.in_proj":
            for index, name in enumerate("qkv"):
                out[f"{transformers_path(f'{found[1]}.attn.{name}_proj')}.{found[3]}"] = _third(x, index)
        else:
            out[f"{transformers_path(f'{found[1]}.{found[2]}')}.{found[3]}"] = x
    return out


def transformers_path(path: str) -> str:
    """What transformers calls a module in the layers of a text tower, without its prefix."""
    _, _, number, module = path.split(".", 3)
    return f"encoder.layers.{number}.{_OUR_LAYER[module]}"


def _transformers_layer(key: str, state: dict[str, AnyTensor], out: dict[str, AnyTensor]) -> None:
    """Put one tensor of a layer into `out`; with the query's come the key's and the value's."""
    number, _, rest = key.removeprefix("encoder.layers.").partition(".")
    module, _, tensor = rest.rpartition(".")
    block = f"transformer.resblocks.{number}"
    if module in _TRANSFORMERS_LAYER:
        out[f"{block}.{_TRANSFORMERS_LAYER[module]}.{tensor}"] = state[key]
        return
    trio = [f"encoder.layers.{number}.self_attn.{name}_proj.{tensor}" for name in "qkv"]
    if key in trio and all(name in state for name in trio):
        if key == trio[0]:
            out[f"{block}.attn.in_proj_{tensor}"] = _joined([state[name] for name in trio])
    else:
        out[key] = state[key]  # strict loading will name it


def to_ours(state: dict[str, AnyTensor]) -> tuple[str, dict[str, AnyTensor]]:
    """The kind of network that weights are, and the weights under our names; a ValueError says what else they are."""
    if any(key.startswith(COMFYUI_PREFIX) for key in state):
        state = strip_comfyui(state)
    if f"{COMFYUI_ENCODER}backbone.0.0.weight" in state:
        state = strip_encoder(state)
    other = foreign(state)
    if other is not None:
        raise ValueError(other)
    mark, kind = next(((mark, kind) for mark, kind in MARKS if mark in state), (None, None))
    if mark is None or kind is None:
        raise ValueError(f"nothing known of Würstchen (its first keys: {', '.join(list(state)[:3]) or 'none'})")
    if kind in ("prior", "decoder"):
        return kind, split_attention(state)
    if kind == "vqgan":
        return kind, vqgan_from_diffusers(state)
    if kind == TEXT_ENCODER:
        return kind, text_from_transformers(state) if "embeddings." in mark else text_from_open_clip(state)
    return kind, state
