"""Restores weights that are stored in 8 bits with scales: our fp8 files, and ComfyUI's quantised files.

Older files have `X.scale_weight`; newer ones `X.weight_scale` and `X.comfy_quant`, a JSON text as bytes, or the same
JSON under `_quantization_metadata` in the header. ConvRot multiplied each group of a row by a Hadamard matrix.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .lazy import AnyTensor, LazyTensor, apply
from .quant import FP8, SCALE_SUFFIX, SCALED_MARK

CONFIG = "comfy_quant"
HEADER = "_quantization_metadata"

_FP8_FORMATS = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}
_INT8_FORMAT = "int8_tensorwise"
_FORMATS = (*_FP8_FORMATS, _INT8_FORMAT)
_SCALES = (SCALE_SUFFIX, "weight_scale")
_INPUT_SCALES = ("scale_input", "input_scale")  # for 8-bit arithmetic, which is not used here
_ADVICE = f"use a file in {', '.join(_FORMATS)}, or one that is not quantised"

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


def with_header_configs(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Tensor]:
    """Returns a file's tensors with the configurations of quantised layers in its header as `X.comfy_quant`.

    Raises ValueError that names the file at `path` if the header is damaged.
    """
    if HEADER not in metadata:
        return dict(state)
    try:
        layers = json.loads(metadata[HEADER])["layers"]
        texts = {f"{layer}.{CONFIG}": json.dumps(config).encode() for layer, config in layers.items()}
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise ValueError(f"{HEADER} in the header of {path} is damaged: download the file again") from error
    return {**state, **{key: torch.frombuffer(bytearray(text), dtype=torch.uint8) for key, text in texts.items()}}


def dequantize(state: Mapping[str, AnyTensor], scaled_only: bool = False) -> dict[str, AnyTensor]:
    """Returns weights with those in 8 bits (`scaled_only`: only those with scales) in the dtype of the other weights.

    Raises ValueError that names the format, the program or the tensor if a weight cannot be restored.
    """
    if program := quantising_program(state):
        raise ValueError(f"the weights are quantised by {program}, which is not supported: {_ADVICE}")
    dtype = _unscaled_dtype(state)
    out: dict[str, AnyTensor] = {}
    beside = {f"{stem}{end}" for stem in _stems(state) for end in (*_SCALES, *_INPUT_SCALES, CONFIG)}
    for key, x in state.items():
        if key in beside or key.rpartition(".")[2] == SCALED_MARK:
            continue
        stem = key.removesuffix("weight")
        scale = next((state[f"{stem}{end}"] for end in _SCALES if f"{stem}{end}" in state), None)
        config = _config(state, stem)
        if stem != key and (config or scale is not None):
            x = _restored(key, x, scale, config, dtype)
        elif x.dtype == FP8 and not scaled_only:
            x = apply(lambda stored: stored.to(dtype), x, shape=x.shape, dtype=dtype)
        out[key] = x
    return out


def _stems(state: Mapping[str, Any]) -> list[str]:
    """Returns the keys of weights without their last word, `weight`."""
    return [key.removesuffix("weight") for key in state if key.endswith("weight") and not key.endswith(SCALE_SUFFIX)]


def _restored(key: str, x: AnyTensor, scale: AnyTensor | None, config: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """Returns a weight that is its stored numbers times its scale, in fp32 and then in `dtype`."""
    form = config.get("format", "float8_e4m3fn")
    if form not in _FORMATS:
        raise ValueError(f"{key} is quantised as {form}, which is not supported: {_ADVICE}")
    stored = _FP8_FORMATS.get(form, torch.int8)
    if x.dtype == torch.int8 and not config:
        raise ValueError(f"{key} holds int8 without {CONFIG}, which says how it is quantised: {_ADVICE}")
    if x.dtype not in ((stored,) if config else (FP8, torch.float8_e5m2)):
        raise ValueError(f"{key} is {str(x.dtype).removeprefix('torch.')}, but its quantisation is {form}: {_ADVICE}")
    if scale is None:
        raise ValueError(f"{key} is quantised as {form} but its scale is missing: download the file again")
    shape: tuple[int, ...] = tuple(x.shape)
    count = torch.Size(scale.shape).numel()
    if count not in (1, shape[0] if shape else 1) or not scale.dtype.is_floating_point:
        raise ValueError(f"the scale of {key} has {count} numbers for {list(shape)}, expected 1 or one per row")
    group = _rotated_group(key, shape, config)
    factors = (count, *(1 for _ in shape[1:])) if count > 1 else ()

    def restore(x: Tensor, scale: Tensor) -> Tensor:
        out = x.to(torch.float32, copy=True).mul_(scale.float().reshape(factors))
        if group:
            out = (out.unflatten(1, (-1, group)) @ hadamard(group)).flatten(1)
        return out.to(dtype)

    return apply(restore, x, scale, shape=shape, dtype=dtype)


def _rotated_group(key: str, shape: tuple[int, ...], config: Mapping[str, Any]) -> int:
    """Returns the size of the groups that ConvRot rotated; 0 if it was not used."""
    nested = config.get("params")
    options = {**(nested if isinstance(nested, dict) else {}), **config}
    if config.get("format") != _INT8_FORMAT or not options.get("convrot"):
        return 0
    group = options.get("convrot_groupsize", 256)
    is_power = isinstance(group, int) and group >= 4 and group & (group - 1) == 0 and group.bit_length() % 2 == 1
    if not is_power or len(shape) != 2 or shape[1] % group:
        raise ValueError(
            f"{key} {list(shape)} cannot be rotated in groups of {group} (ConvRot): download the file again"
        )
    return int(group)


@lru_cache
def hadamard(size: int) -> Tensor:
    """Returns the orthogonal, symmetric matrix [size, size] by which ConvRot multiplies; `size` is a power of 4."""
    base = torch.ones(4, 4) - 2 * torch.eye(4).flip(0)
    out = base
    while len(out) < size:
        out = torch.kron(out, base)
    return out / size**0.5


def _config(state: Mapping[str, Tensor | LazyTensor], start: str) -> dict[str, Any]:
    """Returns the configuration of a quantised layer; {} if it has none. Raises ValueError if it is damaged."""
    stored = state.get(f"{start}{CONFIG}")
    if stored is None:
        return {}
    try:
        config = json.loads(LazyTensor.of(stored).load().numpy().tobytes())
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
    scales = (*_SCALES, *_INPUT_SCALES)
    found = {x.dtype for key, x in state.items() if x.dtype.is_floating_point and not key.endswith(scales)}
    return next((dtype for dtype in (torch.float32, torch.float16) if dtype in found), torch.bfloat16)
