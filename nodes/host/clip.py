"""CLIP objects: the host's own CLIP classes around Würstchen's text towers."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any

import comfy.model_management
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models_base
import torch
from torch import Tensor

from ...wuerstchen_core.checkpoints import Part
from ...wuerstchen_core.models.text_encoder import END, START, TextEncoderParams
from . import folders

# Which of the host's names a tower goes by: LoRA and embedding files address it.
_NAMES = {"prior_text_encoder": "g", "decoder_text_encoder": "h"}

_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}


def transformers_names(state_dict: Mapping[str, Tensor], layers: int) -> dict[str, Tensor]:
    """A tower's weights under the names of transformers, which the host uses; names all that is missing or left."""
    left, missing = dict(state_dict), []

    def take(key: str) -> Tensor:
        if key not in left:
            missing.append(key)
        return left.pop(key, torch.empty(0))

    out = {
        "embeddings.token_embedding.weight": take("token_embedding.weight"),
        "embeddings.position_embedding.weight": take("positional_embedding"),
    }
    for i in range(layers):
        old, new = f"transformer.resblocks.{i}", f"encoder.layers.{i}"
        for kind in ("weight", "bias"):
            for source, target in _BLOCK.items():
                out[f"{new}.{target}.{kind}"] = take(f"{old}.{source}.{kind}")
            for name, rows in zip("qkv", take(f"{old}.attn.in_proj_{kind}").chunk(3), strict=False):
                out[f"{new}.self_attn.{name}_proj.{kind}"] = rows
    for kind in ("weight", "bias"):
        out[f"final_layer_norm.{kind}"] = take(f"ln_final.{kind}")
    if missing or left:
        raise ValueError(
            f"this text tower does not have the {layers} layers its sizes promise: "
            f"missing {missing or 'nothing'}, unexpected {list(left) or 'nothing'}"
        )
    return {f"text_model.{key}": tensor for key, tensor in out.items()}


def _tower(params: TextEncoderParams, device: Any = "cpu", dtype: Any = None, model_options: Any = None) -> Any:
    config = {
        "hidden_size": params.width,
        "intermediate_size": int(params.width * params.mlp_ratio),
        "num_attention_heads": params.heads,
        "num_hidden_layers": params.layers,
        "max_position_embeddings": params.context_length,
        "vocab_size": params.vocab_size,
        "eos_token_id": END,
        "hidden_act": "gelu",
    }
    # The last hidden states after the final norm; padding is masked, as diffusers does.
    return comfy.sd1_clip.SDClipModel(
        device=device,
        dtype=dtype,
        max_length=params.context_length,
        layer="last",
        textmodel_json_config=config,
        special_tokens={"start": START, "end": END, "pad": END},
        enable_attention_masks=True,
        return_projected_pooled=False,
        model_options=model_options or {},
    )


def load_clip(part: Part, metadata: Mapping[str, Any] | None = None) -> Any:
    """A text tower as a CLIP; its bundle's metadata, which may limit the words it knows, travels with it."""
    params, name = part.params, _NAMES[part.name]
    tokenizer = partial(
        comfy.sd1_clip.SDTokenizer,
        max_length=params.context_length,
        pad_with_end=True,
        embedding_size=params.width,
        embedding_key=f"clip_{name}",
    )
    target = comfy.supported_models_base.ClipTarget(
        partial(comfy.sd1_clip.SD1Tokenizer, clip_name=name, tokenizer=tokenizer),
        partial(comfy.sd1_clip.SD1ClipModel, clip_name=name, clip_model=partial(_tower, params)),
    )
    state_dict = transformers_names(part.state_dict, params.layers)
    # Never trained, never read; without it the host would warn of a missing weight.
    state_dict["text_projection.weight"] = torch.eye(params.width)
    options = {}
    if comfy.model_management.is_device_cpu(comfy.model_management.text_encoder_device()):
        options["dtype"] = torch.float32  # the host would store fp16 and compute in fp32
    # The newer host loads the weights itself, before it moves the tower to the device.
    takes_weights = "state_dict" in inspect.signature(comfy.sd.CLIP.__init__).parameters
    clip = comfy.sd.CLIP(
        target,
        embedding_directory=folders.embeddings(),
        parameters=sum(tensor.numel() for tensor in state_dict.values()),
        model_options=options,
        **({"state_dict": [state_dict]} if takes_weights else {}),
    )
    if not takes_weights:
        clip.load_sd(state_dict)
    clip.cond_stage_model.wuerstchen_metadata = dict(metadata or {})  # clones share the tower
    return clip


def metadata_of(clip: Any) -> Mapping[str, Any]:
    """The metadata of the bundle that a CLIP came from; {} for every other CLIP."""
    return getattr(clip.cond_stage_model, "wuerstchen_metadata", {})
