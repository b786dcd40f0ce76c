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
from ..common.text import one_line
from .arguments import named_arguments
from .components import Components

logger = logging.getLogger(__name__)


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
    """Changes the strength of a loaded LoRA. Raises ValueError if it is no number, or no LoRA has this name."""
    with _networks(model) as networks:
        model.lora_stack.set_strength(networks, name, strength)


@named_arguments
def unload_lora(model: Components, name: str | None = None) -> None:
    """Takes a LoRA off, or all of them. Without any, the weights are exactly those before.

    Raises ValueError if no LoRA has this name.
    """
    with _networks(model) as networks:
        for one in model.lora_stack.strengths if name is None else (name,):
            model.lora_stack.remove(networks, one)
            model.sampling = replace(model.sampling, **model.lora_settings.pop(one, {}))


def _set_sampling(model: Components, name: str, file: str, settings: Mapping[str, Any]) -> None:
    """Changes the model's settings of sampling until the LoRA `name` is taken off; logs them."""
    shown = ", ".join(f"{key} = {value!r:.40}" for key, value in settings.items())
    try:
        sampling = replace(model.sampling, **settings)
    except (TypeError, ValueError) as error:
        logger.warning(f"{file} needs settings that are unknown here and left out ({shown}): {one_line(error):.200}")
        return
    model.lora_settings[name] = {key: getattr(model.sampling, key) for key in settings}
    model.sampling = sampling
    logger.warning(f"{file} sets {shown}")


@contextmanager
def _networks(model: Components) -> Iterator[dict[str, Any]]:
    """Yields the networks by part name; those that are replaced in the mapping are replaced in the model."""
    networks = model.named_networks()
    yield networks
    for name, network in networks.items():
        setattr(model, name, network)
