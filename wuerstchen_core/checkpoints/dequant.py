"""Restores weights that are stored in 8 bits with scales: our fp8 and int8 files, and ComfyUI's quantised files.

Older files have `X.scale_weight`; newer ones `X.weight_scale` and `X.comfy_quant`, a JSON text as bytes, or the same
JSON under `_quantization_metadata` in the header. ConvRot multiplied each group of a row by a Hadamard matrix.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..common.text import parse_json
from .convrot import rotate
from .lazy import AnyTensor, LazyTensor, Quantised, apply, lazy_state
from .quant import CONFIG, FORMATS, FP8, INT8, SCALE, chunks, convrot_options

HEADER = "_quantization_metadata"

_NAMES = {dtype: name for name, dtype in FORMATS.items()}
_FP8 = [dtype for dtype in _NAMES if dtype.is_floating_point]
_SCALED_MARK = "scaled_fp8"  # an empty tensor by which older versions of ComfyUI recognised a quantised file
_OLD_SCALE = "scale_weight"
_SCALES = (_OLD_SCALE, SCALE)
_INPUT_SCALES = ("scale_input", "input_scale")  # for 8-bit arithmetic, which is not used here
_BESIDE = (*_SCALES, *_INPUT_SCALES, CONFIG)
_ADVICE = f"use a file in {', '.join(FORMATS)}, or one that is not quantised"

# Parts of keys in other programs' quantised files.
_OTHER_PROGRAMS = (
    (("qweight", "qzeros"), "GPTQ or AWQ"),
    ((".absmax", ".quant_map", "quant_state.bitsandbytes", ".SCB"), "bitsandbytes"),
    (("weight._data", "weight._scale"), "quanto"),
    (("svdq", "wscales", "smooth_factor"), "SVDQuant (Nunchaku)"),
    (("weight_packed", "weight_zero_point"), "compressed-tensors"),
)


def is_scaled(keys: Iterable[str]) -> bool:
    """True if weights are stored in 8 bits with scales."""
    return any(key.endswith(_SCALES) for key in keys)


def with_header_configs(path: Path, state: Mapping[str, LazyTensor], metadata: Mapping[str, str]) -> dict[str, Any]:
    """Returns a file's tensors with the configurations of quantised layers in its header as `X.comfy_quant`.

    Raises ValueError that names the file at `path` if the header is damaged.
    """
    if HEADER not in metadata:
        return dict(state)
    try:
        layers = parse_json(metadata[HEADER])["layers"]
        texts = {f"{layer}.{CONFIG}": json.dumps(config).encode() for layer, config in layers.items()}
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise ValueError(f"{HEADER} in the header of {path} is damaged: download the file again") from error
    return {**state, **{key: torch.frombuffer(bytearray(text), dtype=torch.uint8) for key, text in texts.items()}}


def part_state(state: Mapping[str, Tensor | LazyTensor]) -> dict[str, LazyTensor]:
    """Returns the weights of a network or a Part, with those of int8 layers restored, one by one, when they are read.

    Such layers have `X.weight` and a scale for each row, and are not rotated.
    """
    text = json.dumps({"format": _NAMES[INT8]}).encode()
    stems = [key.removesuffix("weight") for key, x in state.items() if key.endswith("weight") and x.dtype == INT8]
    configs = {f"{stem}{CONFIG}": torch.frombuffer(bytearray(text), dtype=torch.uint8) for stem in stems}
    return dequantize(lazy_state({**configs, **state}), scaled_only=True)


def dequantize(state: Mapping[str, AnyTensor], scaled_only: bool = False) -> dict[str, AnyTensor]:
    """Returns weights with those in 8 bits (`scaled_only`: only those with scales) in the dtype of the other weights.

    LazyTensors also keep what is stored, as `quantised`. Raises ValueError that names the format, the program or the
    tensor if a weight cannot be restored, lacks its scale, or a scale its weight.
    """
    if program := quantising_program(state):
        raise ValueError(f"the weights are quantised by {program}, which is not supported: {_ADVICE}")
    dtype, scaled = _unscaled_dtype(state), is_scaled(state)
    out: dict[str, AnyTensor] = {}
    for key, x in state.items():
        if key.rpartition(".")[2] == _SCALED_MARK:
            continue
        if end := next((end for end in _BESIDE if key.endswith(end)), None):
            if f"{key.removesuffix(end)}weight" not in state:
                raise ValueError(f"{key} has no weight beside it: download the file again")
            continue
        stem = key.removesuffix("weight")
        scale = next((state[f"{stem}{end}"] for end in _SCALES if f"{stem}{end}" in state), None)
        config = _config(state, stem)
        if stem != key and (config or scale is not None):
            x = _restored(key, x, scale, config, dtype)
        elif x.dtype in _FP8 and scaled:
            raise ValueError(f"{key} is stored in fp8 but its scale is missing: download the file again")
        elif x.dtype == FP8 and not scaled_only:
            x = apply(lambda stored: stored.to(dtype), x, shape=x.shape, dtype=dtype)
        out[key] = x
    return out


def _restored(key: str, x: AnyTensor, scale: AnyTensor | None, config: dict[str, Any], dtype: torch.dtype) -> Any:
    """Returns a weight that is its stored numbers times its scale, in fp32 and then in `dtype`."""
    form = config.get("format") or _NAMES.get(x.dtype, "float8_e4m3fn")
    if form not in FORMATS:
        raise ValueError(f"{key} is quantised as {form}, which is not supported: {_ADVICE}")
    if x.dtype == INT8 and not config:
        raise ValueError(f"{key} holds int8 without {CONFIG}, which says how it is quantised: {_ADVICE}")
    if x.dtype != FORMATS[form]:
        raise ValueError(f"{key} is {str(x.dtype).removeprefix('torch.')}, but its quantisation is {form}: {_ADVICE}")
    if scale is None:
        raise ValueError(f"{key} is quantised as {form} but its scale is missing: download the file again")
    shape: tuple[int, ...] = tuple(x.shape)
    factors = _check_scale(key, scale, shape)
    group = _rotated_group(key, shape, config)

    def restore(x: Tensor, scale: Tensor) -> Tensor:
        out = torch.empty(x.shape, dtype=dtype, device=x.device)
        scale = scale.to(x.device, torch.float32).reshape(factors).expand(x.shape)
        for source, factor, target in chunks(x, scale, out):
            target.copy_(rotate(source.float().mul_(factor), group))
        return out

    out = apply(restore, x, scale, shape=shape, dtype=dtype)
    if isinstance(x, LazyTensor):
        out = replace(out, quantised=Quantised(x, LazyTensor.of(scale), config or {"format": form}))
    return out


def _check_scale(key: str, scale: Tensor | LazyTensor, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape in which a scale multiplies a weight. Raises ValueError if it cannot be its scale."""
    found = tuple(scale.shape)
    count = torch.Size(found).numel()
    per_row = found[:1] == shape[:1] and count == found[0] if shape and found else False
    if not (count == 1 or per_row) or len(found) > max(1, len(shape)) or not scale.dtype.is_floating_point:
        raise ValueError(f"the scale of {key} is {list(found)} for {list(shape)}, expected one number, or one per row")
    lazy = LazyTensor.of(scale)
    if not lazy.load().float().isfinite().all():
        raise ValueError(f"the scale of {key} is not finite: download the file again")
    return (count, *(1 for _ in shape[1:])) if count > 1 else ()


def _rotated_group(key: str, shape: tuple[int, ...], config: Mapping[str, Any]) -> int:
    """Returns the size of the groups that ConvRot rotated; 0 if it was not used."""
    options = convrot_options(config)
    if config.get("format") != _NAMES[INT8] or not options.get("convrot"):
        return 0
    group = options.get("convrot_groupsize", 256)
    is_power = isinstance(group, int) and group >= 4 and group & (group - 1) == 0 and group.bit_length() % 2 == 1
    if not is_power or len(shape) != 2 or shape[1] % group:
        raise ValueError(
            f"{key} {list(shape)} cannot be rotated in groups of {group} (ConvRot): download the file again"
        )
    return int(group)


def _config(state: Mapping[str, Tensor | LazyTensor], start: str) -> dict[str, Any]:
    """Returns the configuration of a quantised layer; {} if it has none. Raises ValueError if it is damaged."""
    stored = state.get(f"{start}{CONFIG}")
    if stored is None:
        return {}
    try:
        config = parse_json(LazyTensor.of(stored).load().numpy().tobytes())
    except (ValueError, TypeError, RuntimeError):
        config = None
    if not isinstance(config, dict) or not isinstance(config.get("format"), str):
        raise ValueError(f"{start}{CONFIG} is damaged: download the file again")
    return config


def quantising_program(keys: Iterable[str]) -> str | None:
    """Returns the program that quantised weights, if their keys show one whose files this project does not read."""
    keys = list(keys)
    return next((name for marks, name in _OTHER_PROGRAMS if any(mark in key for key in keys for mark in marks)), None)


def _unscaled_dtype(state: Mapping[str, Tensor | LazyTensor]) -> torch.dtype:
    """Returns the widest dtype of the weights that are neither in 8 bits nor scales; bf16 if there is no other."""
    found = {x.dtype for key, x in state.items() if x.dtype.is_floating_point and not key.endswith(_BESIDE)}
    return next((dtype for dtype in (torch.float32, torch.float16) if dtype in found), torch.bfloat16)
