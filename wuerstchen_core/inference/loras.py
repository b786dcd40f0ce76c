"""Loads LoRAs into a model, changes their strengths, and takes them off, without loading the model again."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..checkpoints.embeddings import bundled_embeddings
from ..checkpoints.lora_merge import AnyPath
from .arguments import named_arguments
from .components import Components

logger = logging.getLogger(__name__)


@named_arguments
def load_lora(model: Components, source: AnyPath, strength: float = 1.0, *, name: str | None = None) -> str:
    """Merges a LoRA (a file, or a folder of PEFT or diffusers) into the stage that it fits and its text encoder.

    Returns its name for `set_lora_strength` and `unload_lora`: `name`, or else the file's. Several LoRAs add up, and
    textual inversions that they bundle are for prompts with `embedding:NAME`. Raises ValueError, without changing the
    model, if the LoRA cannot be read or does not fit, or the name is in use.
    """
    with _networks(model) as networks:
        name, lora = model.lora_stack.add(networks, source, strength, name)
    if bundled := bundled_embeddings(lora.embeddings):
        model.embeddings |= bundled
        prompts = ", ".join(f"embedding:{one}" for one in bundled)
        logger.warning(f"{Path(source).name} bundles embeddings, which prompts use as {prompts}")
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


@contextmanager
def _networks(model: Components) -> Iterator[dict[str, Any]]:
    """Yields the networks by part name; those that are replaced in the mapping are replaced in the model."""
    networks = model.named_networks()
    yield networks
    for name, network in networks.items():
        setattr(model, name, network)
