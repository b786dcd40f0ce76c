"""Loads LoRAs into a model, changes their strengths, and takes them off, without loading the model again."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..checkpoints.embeddings import bundled_embeddings
from ..checkpoints.lora_merge import AnyPath
from ..common.text import listed, one_line, printable
from .arguments import named_arguments
from .components import Components, Group, Values
from .settings import SamplingSettings

logger = logging.getLogger(__name__)

# The settings that a distilled LoRA may change. Those of a group depend on each other.
FEW_STEPS: tuple[Group, ...] = (
    ("schedule", "sampler", "prior_steps"),
    ("prior_guidance",),
    ("decoder_steps",),
    ("decoder_guidance", "decoder_guidance_end"),
)


@named_arguments
def load_lora(model: Components, source: AnyPath, strength: float = 1.0, *, name: str | None = None) -> str:
    """Merges a LoRA (a file, or a folder of PEFT or diffusers) into the stage that it fits and its text encoder.

    Returns its name for `set_lora_strength` and `unload_lora`: `name`, or else the file's. Several LoRAs add up, and
    textual inversions that they bundle are for prompts with `embedding:NAME`. Those of `train distill-lora` set the few
    steps that they are for in `sampling`. Raises ValueError, without changing the model, if the LoRA cannot be read or
    does not fit, or the name is in use.
    """
    with _networks(model) as networks:
        name, lora = model.lora_stack.add(networks, source, strength, name)
    if bundled := bundled_embeddings(lora.embeddings):
        model.embeddings |= bundled
        prompts = ", ".join(f"embedding:{one}" for one in bundled)
        logger.warning(f"{Path(source).name} bundles embeddings, which prompts use as {prompts}")
    if lora.sampling:
        _set_sampling(model, name, Path(source).name, lora.sampling)
    return name


@named_arguments
def set_lora_strength(model: Components, name: str, strength: float) -> None:
    """Changes the strength of a loaded LoRA. Raises ValueError if it is no number, or no LoRA has this name.

    The settings of a distilled LoRA stay at any strength: take it off with `unload_lora` rather than with 0.
    """
    with _networks(model) as networks:
        model.lora_stack.set_strength(networks, name, strength)


@named_arguments
def unload_lora(model: Components, name: str | None = None) -> None:
    """Takes a LoRA off, or all of them. Without any, the weights are exactly those before.

    So are the settings in `sampling` that it changed, unless they were changed again meanwhile. Raises ValueError if no
    LoRA has this name.
    """
    with _networks(model) as networks:
        for one in model.lora_stack.strengths if name is None else (name,):
            model.lora_stack.remove(networks, one)
            _restore_sampling(model, one)


def _set_sampling(model: Components, name: str, file: str, settings: Mapping[str, Any]) -> None:
    """Changes the model's settings of sampling until the LoRA `name` is taken off; logs them."""
    shown = printable(", ".join(f"{key} = {value!r:.40}" for key, value in settings.items()))
    before = model.sampling
    try:
        if unknown := settings.keys() - {key for group in FEW_STEPS for key in group}:
            raise ValueError(f"not {listed(sorted(unknown))}")
        model.sampling = replace(before, **settings)
    except (TypeError, ValueError) as error:
        logger.warning(f"{file} needs settings that are unknown here and left out ({shown}): {one_line(error):.200}")
        return
    model.lora_settings[name] = {
        group: (_values(before, group), _values(model.sampling, group))
        for group in FEW_STEPS
        if any(key in settings for key in group)
    }
    logger.warning(f"{file} sets {shown}")


def _restore_sampling(model: Components, name: str) -> None:
    """Takes back the settings of a LoRA: in the model's, or in what a LoRA that came later and also sets them found."""
    names = list(model.lora_settings)
    later = [model.lora_settings[other] for other in names[names.index(name) + 1 :]] if name in names else []
    for group, (before, own) in model.lora_settings.pop(name, {}).items():
        if found := next((settings for settings in later if group in settings), None):
            if found[group][0] == own:
                found[group] = before, found[group][1]
        elif _values(model.sampling, group) == own:
            model.sampling = replace(model.sampling, **before)


def _values(sampling: SamplingSettings, group: Group) -> Values:
    return {key: getattr(sampling, key) for key in group}


@contextmanager
def _networks(model: Components) -> Iterator[dict[str, Any]]:
    """Yields the networks by part name; those that are replaced in the mapping are replaced in the model."""
    networks = model.named_networks()
    yield networks
    for name, network in networks.items():
        setattr(model, name, network)
