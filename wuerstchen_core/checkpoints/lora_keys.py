"""Parses the keys of LoRA files, in every trainer's names.

A key names the network or a text tower, a module in it, and one of the tensors that change the module's weight. It is
dotted (diffusers, PEFT, ComfyUI, OneTrainer) or flat, with underscores between modules (Kohya, OneTrainer's KOHYA_LORA
and its files of 2023 and 2024).
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_FACTORS = (
    *(f"{name}_{side}" for name in ("hada_w1", "hada_w2", "lokr_w1", "lokr_w2") for side in "ab"),
    *("lokr_w1", "lokr_w2", "lokr_t2", "hada_t1", "hada_t2"),
)
# Ends of keys, and ComfyUI's name of that tensor. `lora_A` is PEFT's, followed by the adapter's name in files that
# PEFT itself wrote; `processor.to_q_lora.down` is diffusers' of 2023.
_TENSORS = tuple(
    (re.compile(rf"[._]{end}$"), tensor)
    for end, tensor in (
        (r"lora(?:_linear_layer)?[._](?:down|A)(?:\.default)?(?:\.weight)?", "lora_down.weight"),
        (r"lora(?:_linear_layer)?[._](?:up|B)(?:\.default)?(?:\.weight)?", "lora_up.weight"),
        (r"lora_magnitude_vector(?:\.default)?(?:\.weight)?", "magnitude"),
        (r"w_norm", "diff"),  # LyCORIS' differences of norms
        (r"b_norm", "diff_b"),
        *((name, name) for name in ("alpha", "dora_scale", "diff", "diff_b", "set_weight", "oft_blocks")),
        *((rf"{name}(?:\.default)?", name) for name in _FACTORS),
        (r"lora_mid\.weight", "lora_mid.weight"),
        (r"lora_B(?:\.default)?\.bias", "lora_bias"),
        # Unsupported, so that their modules are left out.
        (r"(?:[ab][12]\.weight|oft_\w+(?:\.weight)?|rescale|reshape_weight)", None),
    )
)

_TEXT = re.compile(
    r"^(?:(?:text_encoder|(?:text_encoders\.)?clip_[a-z]\.transformer)\.|lora_(?:prior_te|te1?)[._])"
    r"(?:base_model\.model\.)?(?:text_model[._])?|^(?:base_model\.model\.)?text_model[._]"
    r"|^base_model\.model\.(?=(?:encoder\.layers|embeddings|final_layer_norm)\.)"
)
_NETWORK = re.compile(
    r"^(?:(?:prior|unet|model|diffusion_model|base_model\.model)\.|lora_(?:prior_unet|prior_prior|unet)[._]|lycoris_)*"
)
PEFT_PREFIX = "base_model.model."
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:module|_orig_mod)\.")  # of DistributedDataParallel and torch.compile
# Parameters that PEFT trains as a whole (`bias`, `modules_to_save`).
_WHOLE = re.compile(r"\.(?:base_layer|modules_to_save(?:\.default)?)(?=\.)|\.weight$")
# The underscores of a flat path that stand for dots: next to a number, and after these modules.
_DOTS = re.compile(r"_(?=\d+(?:_|$))|(?<=\d)_|(?<=attention)_|(?<=self_attn)_|(?<=encoder)_|(?<=mlp)_")

_STAGES = {  # by the first component of module paths
    **dict.fromkeys(("blocks", "projection", "cond_mapper", "out"), "prior"),
    **dict.fromkeys(("down_blocks", "up_blocks", "clip_mapper", "effnet_mappers", "seq_norm", "clf"), "decoder"),
}

_FAMILIES = (
    (r"lora_te2|text_encoder_2|(?:input|output|mid)_block|_blocks[._]\d+[._]attentions", "Stable Diffusion or SDXL"),
    (r"double_blocks|single_(?:transformer_)?blocks", "Flux"),
    (r"attention[._]attn[._]", "Stable Cascade"),
    (r"(?:down|up)_blocks[._]\d+[._]\d+[._]", "Würstchen's decoder or Stable Cascade"),
    (r"(?:^|[._])blocks[._]\d+[._]attention[._]", "Würstchen's prior"),
    (r"transformer", "a model of another family"),
)


def family(keys: Iterable[str]) -> str:
    """Returns the name of the model that keys suggest."""
    keys = list(keys)
    return next((name for mark, name in _FAMILIES if any(re.search(mark, key) for key in keys)), "another model")


def stage_of(path: str) -> str | None:
    """Returns the stage ("prior" or "decoder") that has a module of this path; None if none has."""
    return _STAGES.get(path.partition(".")[0])


def split_key(key: str) -> tuple[str, str]:
    """Splits a key into its module's path as the file has it and the tensor's name; both are empty for other keys."""
    key = _WRAPPERS.sub("", key)
    for end, tensor in _TENSORS:
        if found := end.search(key):
            return key[: found.start()], tensor or found[0]
    return (_WHOLE.sub("", key), "set_weight") if key.startswith(PEFT_PREFIX) else ("", "")


def parse_key(key: str) -> tuple[str, str, str]:
    """Splits a key into ("network" or "text", module path, tensor); all are empty if it is not an adapter's key."""
    path, tensor = split_key(key)
    return (*_parse_path(path), tensor) if path else ("", "", "")


def _parse_path(path: str) -> tuple[str, str]:
    text = _TEXT.match(path)
    path = path[text.end() :] if text else _NETWORK.sub("", path)
    if "." not in path:
        path = _DOTS.sub(".", path)
    if text:
        return "text", re.sub(r"(?<=self_attn\.)to_(q|k|v|out)$", r"\1_proj", path)
    return "network", re.sub(r"(?<=\.to_out)$", ".0", path.replace(".processor.", "."))
