"""CLIP objects: ComfyUI's CLIP classes around Würstchen's text encoders."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import comfy.model_management
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models_base
import torch

from ...wuerstchen_core.checkpoints import Part, build_part
from ...wuerstchen_core.checkpoints.components import TEXT_ENCODER
from ...wuerstchen_core.checkpoints.key_maps import COMFYUI_CLIPS, text_config, text_to_transformers
from ...wuerstchen_core.demo.vocabulary import unknown_words_note
from ...wuerstchen_core.models.text_encoder import END, START, TextEncoderParams
from . import folders
from .notices import notify

_EMBEDDING = re.compile(r"embedding:\S+")  # the name of a file, not a word of the prompt


def _text_model(params: TextEncoderParams, device: Any = "cpu", dtype: Any = None, model_options: Any = None) -> Any:
    """Returns ComfyUI's text encoder: its result is the last layer after the final norm, with padding masked."""
    return comfy.sd1_clip.SDClipModel(
        device=device,
        dtype=dtype,
        max_length=params.context_length,
        layer="last",
        textmodel_json_config=text_config(params),
        special_tokens={"start": START, "end": END, "pad": END},
        enable_attention_masks=True,
        return_projected_pooled=False,
        model_options=model_options or {},
    )


class _Tokenizer(comfy.sd1_clip.SD1Tokenizer):
    """Notifies of words that the model does not know, from every node that encodes a prompt."""

    def __init__(self, metadata: Mapping[str, Any], *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.metadata = metadata

    def tokenize_with_weights(self, text: str, *args: Any, **kwargs: Any) -> Any:
        if note := unknown_words_note([_EMBEDDING.sub(" ", text)], self.metadata, reported=set()):
            notify(note.splitlines()[0])  # the second line is a command
        return super().tokenize_with_weights(text, *args, **kwargs)


def load_clip(part: Part, metadata: Mapping[str, Any] | None = None) -> Any:
    """Returns a text encoder as a CLIP, which notifies of words that the bundle's `metadata` does not know."""
    import transformers

    comfy.model_management.throw_exception_if_processing_interrupted()
    params = part.params
    name = COMFYUI_CLIPS[part.name.removesuffix(f"_{TEXT_ENCODER}")].removeprefix(
        "clip_"
    )  # as in LoRA and embedding files
    tokenizer = partial(
        comfy.sd1_clip.SDTokenizer,
        max_length=params.context_length,
        pad_with_end=True,
        embedding_size=params.width,
        embedding_key=f"clip_{name}",
        # In transformers 4, CLIPTokenizer is another class, which rewrites quotes where ftfy is installed.
        tokenizer_class=getattr(transformers, "CLIPTokenizerFast", transformers.CLIPTokenizer),
    )
    target = comfy.supported_models_base.ClipTarget(
        partial(_Tokenizer, dict(metadata or {}), clip_name=name, tokenizer=tokenizer),
        partial(comfy.sd1_clip.SD1ClipModel, clip_name=name, clip_model=partial(_text_model, params)),
    )
    # build_part reports missing and unexpected weights.
    state_dict = {f"text_model.{key}": x for key, x in text_to_transformers(build_part(part).state_dict()).items()}
    # Untrained and unused; without it ComfyUI would warn of a missing weight.
    state_dict["text_projection.weight"] = torch.eye(params.width)
    options = {}
    if comfy.model_management.is_device_cpu(comfy.model_management.text_encoder_device()):
        options["dtype"] = torch.float32  # ComfyUI would store fp16 and compute in fp32
    # Newer ComfyUI versions load the weights before they move the model to the device.
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
    return clip
