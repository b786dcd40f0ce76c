"""Applies LoRA files with ComfyUI's patches, after matching their keys and shapes to the model."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import comfy.sd
import torch
from torch import Tensor

from ...wuerstchen_core.checkpoints.adapters import Fit, comfyui_dora_scale, fit, keys_of
from ...wuerstchen_core.checkpoints.lazy import load_state
from ...wuerstchen_core.checkpoints.lora_files import (
    NETWORK_PREFIX,
    Lora,
    converted_metadata,
    ignored,
    read_lora,
    to_comfyui,
)
from ...wuerstchen_core.checkpoints.weight_files import read_weight_file
from ...wuerstchen_core.checkpoints.writer import write_tensors
from ...wuerstchen_core.common.text import listed
from .few_steps import notify_of_few_steps
from .models import PriorModel, StageModel
from .notices import notify

logger = logging.getLogger(__name__)

_TEXT_MODEL = re.compile(r"(clip_\w+)\.transformer\.text_model\.")


def apply_lora(
    model: Any, clip: Any, path: Path, strength_model: float, strength_clip: float
) -> tuple[Any, Any, dict[str, Tensor]]:
    """Returns a MODEL and a CLIP (or None) with a LoRA file applied, and the file's tensors under ComfyUI's keys.

    A strength of 0 leaves its object unchanged. Notices name the keys that do not fit, and the settings that a
    distilled LoRA needs; raises ValueError if nothing fits the MODEL or the CLIP.
    """
    if not isinstance(model.model, StageModel):
        raise ValueError(
            f"Würstchen LoRA Loader got another model ({type(model.model).__name__}): "
            "connect the prior output of a Würstchen loader"
        )
    lora = read_lora(path)
    network = fit(lora.network, _shapes(model.model, NETWORK_PREFIX))
    name = None if clip is None else _text_encoder(clip)
    prefix = f"{name}.transformer.text_model."
    text = Fit(lora.text, {}, {}) if name is None else fit(lora.text, _shapes(clip.cond_stage_model, prefix))
    _check(path.name, lora, network, text, model, clip)
    _notify_ignored(path.name, lora, network, text, without_clip=clip is None)
    if strength_model:
        notify_of_few_steps(path.name, lora.sampling)
    changes = to_comfyui(network.fitting, {}, "")
    text_changes = {} if name is None else to_comfyui({}, text.fitting, name)
    if strength_model and changes:
        patches = changes | _dora_scales(model, network, NETWORK_PREFIX, NETWORK_PREFIX)
        model, _ = comfy.sd.load_lora_for_models(model, None, patches, strength_model, 0)
    if strength_clip and text_changes:
        patches = text_changes | _dora_scales(clip.patcher, text, prefix, f"text_encoders.{prefix}")
        patches = {key: x for key, x in patches.items() if not key.endswith(".bias.set_weight")}
        patches |= _bias_changes(clip.patcher, text, prefix, strength_clip)
        _, clip = comfy.sd.load_lora_for_models(None, clip, patches, 0, strength_clip)
    return model, clip, changes | text_changes


def _shapes(module: torch.nn.Module, prefix: str) -> dict[str, torch.Size]:
    """Returns the shapes of all parameters whose keys start with `prefix`, without it."""
    return {key.removeprefix(prefix): x.shape for key, x in module.state_dict().items() if key.startswith(prefix)}


def _text_encoder(clip: Any) -> str:
    """Returns the name of a CLIP's only text encoder, such as clip_g."""
    names = {match[1] for key in clip.cond_stage_model.state_dict() if (match := _TEXT_MODEL.match(key))}
    if len(names) != 1:
        raise ValueError(
            f"Würstchen LoRA Loader got a CLIP with {len(names)} text encoders instead of 1: connect the prior clip "
            "output of a Würstchen loader"
        )
    return names.pop()


def _dora_scales(patcher: Any, found: Fit, prefix: str, lora_prefix: str) -> dict[str, Tensor]:
    """Returns DoRA's magnitudes for ComfyUI's formula, computed from the weights without patches."""
    scales = {}
    for path, adapter in found.fitting.items():
        if "dora_scale" in adapter.tensors:
            key = f"{prefix}{path}.weight"
            (weight, convert), *_ = patcher.get_key_patches(key)[key]
            tensors = {name: x.float() for name, x in adapter.tensors.items()}
            weight = convert(weight.to("cpu", copy=True)).float()
            scales[f"{lora_prefix}{path}.dora_scale"] = comfyui_dora_scale(weight, tensors)
    return scales


def _bias_changes(patcher: Any, found: Fit, prefix: str, strength: float) -> dict[str, Tensor]:
    """Returns new values of a text encoder's biases as differences, since ComfyUI sets only its weights."""
    changes = {}
    for path, adapter in found.fitting.items():
        if path.endswith(".bias") and "set_weight" in adapter.tensors:
            key = f"{prefix}{path}"
            (bias, convert), *_ = patcher.get_key_patches(key)[key]
            change = adapter.tensors["set_weight"].float() - convert(bias.to("cpu", copy=True)).float()
            changes[f"text_encoders.{key.removesuffix('.bias')}.diff_b"] = change / strength
    return changes


def _check(name: str, lora: Lora, network: Fit, text: Fit, model: Any, clip: Any) -> None:
    """Raises ValueError if nothing of a LoRA fits the MODEL, or nothing of its text part fits the CLIP."""
    stage = "this prior" if isinstance(model.model, PriorModel) else "this decoder"
    if lora.network and not network.fitting:
        if network.misshaped:
            raise ValueError(
                f"{name} was trained on a model of another size ({network.example}): use a LoRA made for {stage}"
            )
        raise ValueError(
            f"none of the {len(lora.keys)} keys of {name} (such as {keys_of(lora.network)[0]}) fits {stage}; it seems "
            f"made for {lora.family()}: use a LoRA made for {stage}"
        )
    if lora.text and not text.fitting:
        reason = f"has another size ({text.example})" if text.misshaped else "names none of its layers"
        raise ValueError(
            f"the text part of {name} does not fit this CLIP, because it {reason}: connect the prior clip output "
            "of the Würstchen loader, or no CLIP"
        )
    if not lora.network and clip is None:
        raise ValueError(f"{name} changes only the text encoder: connect the prior clip output of a Würstchen loader")


def _notify_ignored(name: str, lora: Lora, network: Fit, text: Fit, without_clip: bool) -> None:
    """Shows one line about what a LoRA holds but the MODEL and CLIP cannot use."""
    unused = ignored(lora, (network, text))
    if without_clip and lora.text:
        unused.append(f"{len(keys_of(lora.text))} keys of the text encoder (no CLIP is connected)")
    if lora.embeddings:
        unused.append(
            f"{len(lora.embeddings)} bundled embeddings ({listed(list(lora.embeddings))}; copy the file to "
            "models/embeddings, and write embedding:FILE in a prompt)"
        )
    if unused:
        notify(f"{name}: ignored {'; '.join(unused)}")
    if lora.note:
        notify(f"{name}: {lora.note}")


def write_converted(path: Path, state: Mapping[str, Tensor], folder: Path) -> Path:
    """Writes a LoRA under ComfyUI's keys to a folder, with its file's metadata; returns the new file's path.

    An equal file is left alone; ValueError if a different file of that name exists or it cannot be written.
    """
    target = folder / f"{path.stem}_comfyui.safetensors"
    if target.exists():
        if not _holds(target, state):
            raise ValueError(f"{target.name} exists with other contents: move it away, or turn save_converted off")
        return target
    try:
        write_tensors(target, state, converted_metadata(path, dict(state)))
    except OSError as error:
        raise ValueError(f"{error}; or turn save_converted off") from error
    logger.info(f"wrote {target}")
    return target


def _holds(path: Path, state: Mapping[str, Tensor]) -> bool:
    """True if a file holds exactly these tensors."""
    found = load_state(next(iter(read_weight_file(path).states.values())))
    return found.keys() == state.keys() and all(torch.equal(x, state[key]) for key, x in found.items())
