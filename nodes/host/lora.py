"""LoRAs: the host's own patches, on keys that were sorted and measured before."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import comfy.sd
import torch
from torch import Tensor

from ...wuerstchen_core.checkpoints.adapters import Adapters, Fit, fit, keys_of
from ...wuerstchen_core.checkpoints.components import listed
from ...wuerstchen_core.checkpoints.lora_files import Lora, read_lora
from ...wuerstchen_core.checkpoints.weight_files import read_file_metadata, read_weight_file
from ...wuerstchen_core.checkpoints.writer import write_tensors
from .models import PriorModel, StageModel

logger = logging.getLogger(__name__)

NETWORK = "diffusion_model."  # where the host keeps the weights of a MODEL
_TOWER = re.compile(r"(clip_\w+\.transformer\.text_model\.)")


def apply_lora(
    model: Any, clip: Any, path: Path, strength_model: float, strength_clip: float
) -> tuple[Any, Any, dict[str, Tensor]]:
    """A MODEL and a CLIP (or None) with a LoRA file's changes, and those changes under ComfyUI's keys.

    A strength of 0 leaves its object as it is. What fits nothing is told in one line of the log; a ValueError says
    what a file is of which nothing fits the MODEL or the CLIP.
    """
    if not isinstance(model.model, StageModel):
        raise ValueError(
            f"Würstchen LoRA Loader was given another model ({type(model.model).__name__}): "
            "connect the prior output of a Würstchen loader"
        )
    lora = read_lora(path)
    network = fit(lora.network, _shapes(model.model, NETWORK))
    tower = None if clip is None else _tower(clip)
    text = Fit(lora.text, {}, {}) if tower is None else fit(lora.text, _shapes(clip.cond_stage_model, tower))
    _check(path.name, lora, network, text, model, clip)
    changes = _named(network.fitting, NETWORK)
    words = {} if tower is None else _named(text.fitting, f"text_encoders.{tower}")
    _report(path.name, lora, network, text, unused=clip is None)
    if strength_model and network.fitting:
        model, _ = comfy.sd.load_lora_for_models(model, None, changes, strength_model, 0)
    if strength_clip and tower is not None and text.fitting:
        _, clip = comfy.sd.load_lora_for_models(None, clip, words, 0, strength_clip)
    return model, clip, changes | words


def _shapes(module: torch.nn.Module, prefix: str) -> dict[str, torch.Size]:
    """The shapes of all weights below `prefix`, by module path."""
    return {
        key.removeprefix(prefix).removesuffix(".weight"): x.shape
        for key, x in module.state_dict().items()
        if key.startswith(prefix) and key.endswith(".weight")
    }


def _tower(clip: Any) -> str:
    """The prefix of a CLIP's only text tower, such as clip_g.transformer.text_model."""
    towers = {found[1] for key in clip.cond_stage_model.state_dict() if (found := _TOWER.match(key))}
    if len(towers) != 1:
        raise ValueError(
            f"Würstchen LoRA Loader was given a CLIP of {len(towers)} text towers, and Würstchen's have one: "
            "connect the prior clip output of a Würstchen loader"
        )
    return towers.pop()


def _named(adapters: Adapters, prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}{path}.{name}": x for path, adapter in adapters.items() for name, x in adapter.tensors.items()}


def _check(name: str, lora: Lora, network: Fit, text: Fit, model: Any, clip: Any) -> None:
    """Raise ValueError if nothing of what a LoRA holds for the MODEL, or for the CLIP, fits it."""
    stage = "this prior" if isinstance(model.model, PriorModel) else "this decoder"
    if lora.network and not network.fitting:
        if network.misshaped:
            raise ValueError(
                f"{name} was trained on a model of other sizes ({network.example}): take a LoRA made for {stage}"
            )
        raise ValueError(
            f"{name} fits nothing in {stage}: none of its {len(lora.keys)} keys (such as {keys_of(lora.network)[0]}) "
            f"names a module of it; it looks made for {lora.family()}, so take a LoRA made for {stage}"
        )
    if lora.text and not text.fitting:
        what = f"is of other sizes ({text.example})" if text.misshaped else "names no layer of it"
        raise ValueError(
            f"the text part of {name} {what}, so this CLIP is not the one it was trained on: "
            "connect the prior clip output of the Würstchen loader, or no CLIP"
        )
    if not lora.network and clip is None:
        raise ValueError(f"{name} changes a text tower only: connect the prior clip output of a Würstchen loader too")


def _report(name: str, lora: Lora, network: Fit, text: Fit, unused: bool) -> None:
    """Say in one line what of a LoRA is left out."""
    absent = [*keys_of(network.absent), *keys_of(text.absent), *lora.unknown]
    misshaped = [*keys_of(network.misshaped), *keys_of(text.misshaped)]
    left = []
    if absent:
        left.append(f"{len(absent)} keys that fit nothing ({listed(absent)})")
    if misshaped:
        left.append(f"{len(misshaped)} keys of other sizes ({listed(misshaped)}; {network.example or text.example})")
    if unused and lora.text:
        left.append(f"{len(keys_of(lora.text))} keys of the text tower, for which no CLIP is connected")
    if lora.embeddings:
        left.append(f"{len(lora.embeddings)} bundled embeddings ({listed(lora.embeddings)}), which are no LoRA")
    if left:
        logger.warning(f"{name}: left out are {', and '.join(left)}")


def write_converted(path: Path, state: Mapping[str, Tensor]) -> Path:
    """Write a LoRA under ComfyUI's keys beside its file, which its metadata go along from; the new file's path.

    ValueError if another file of that name is there; an equal one stays.
    """
    target = path.with_name(f"{path.stem}_comfyui.safetensors")
    if target.exists():
        if not _holds(target, state):
            raise ValueError(
                f"{target.name} is there already and holds something else: move it away, or turn save_converted off"
            )
        return target
    try:
        write_tensors(target, state, read_file_metadata(path))
    except OSError as error:
        raise ValueError(f"{error}; or turn save_converted off") from error
    logger.info(f"wrote {target}")
    return target


def _holds(path: Path, state: Mapping[str, Tensor]) -> bool:
    """Whether a file holds exactly these tensors."""
    held = next(iter(read_weight_file(path).states.values()))
    return held.keys() == state.keys() and all(torch.equal(x, state[key]) for key, x in held.items())
