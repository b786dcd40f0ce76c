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
from ...wuerstchen_core.checkpoints.key_maps import text_to_transformers, text_tower_keys
from ...wuerstchen_core.common.text import listed
from ...wuerstchen_core.models.text_encoder import END, START, TextEncoderParams
from . import folders

# Which of the host's names a tower goes by: LoRA and embedding files address it.
_NAMES = {"prior_text_encoder": "g", "decoder_text_encoder": "h"}


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


def _check_keys(state_dict: Mapping[str, Tensor], layers: int) -> None:
    """Raises ValueError that names missing and unexpected keys: ComfyUI would only log them."""
    expected = text_tower_keys(layers)
    missing = [key for key in expected if key not in state_dict]
    unexpected = [key for key in state_dict if key not in expected]
    if missing or unexpected:
        raise ValueError(
            f"the weights do not fit a text tower of {layers} layers; "
            f"missing: {listed(missing) or 'none'}, unexpected: {listed(unexpected) or 'none'}"
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
    _check_keys(part.state_dict, params.layers)
    state_dict = {f"text_model.{key}": x for key, x in text_to_transformers(part.state_dict).items()}
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
