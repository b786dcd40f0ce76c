"""The notice about distilled networks, which give bad images with other settings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ...wuerstchen_core.common.text import printable
from .notices import notify

_WIDGETS = {  # by part: our node, and its widgets by the setting of `train distill`
    "prior": ("Würstchen Prior Sample", {"schedule": "schedule", "prior_steps": "steps", "prior_guidance": "cfg"}),
    "decoder": ("Würstchen Decoder Sample", {"decoder_steps": "steps", "decoder_guidance": "cfg"}),
}


def notify_of_few_steps(name: str, sampling: Mapping[str, Any], parts: Iterable[str] = tuple(_WIDGETS)) -> None:
    """Shows which widgets to set for parts of a distilled file with settings of sampling, if there are any."""
    nodes = []
    for node, names in (_WIDGETS[part] for part in parts if part in _WIDGETS):
        if widgets := [f"{widget} to {sampling[key]!s:.20}" for key, widget in names.items() if key in sampling]:
            nodes.append(f"set {', '.join(widgets)} in {node}")
    if nodes:
        notify(printable(f"{name} is for few steps: {'; '.join(nodes)}"))


def notify_if_distilled(name: str, metadata: Mapping[str, Any], parts: Iterable[str] = tuple(_WIDGETS)) -> None:
    """Shows the same for a file with weights, if its metadata say that it was distilled."""
    sampling = metadata.get("sampling")
    if "distillation" in metadata and isinstance(sampling, Mapping):
        notify_of_few_steps(name, sampling, parts)
