"""Reuse of Stage B's deep levels in ComfyUI's sampling, where other nodes change what a call of the network is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ...wuerstchen_core.models.feature_reuse import DeepFeatures, FeatureReuse
from .network_patches import STG

REUSE = "wuerstchen_reuse"  # the key of a FeatureReuse in transformer_options
PATCHES = ("patches", "patches_replace", STG)  # may differ from step to step, or between two calls of one step


@contextmanager
def reusing(model: Any, interval: int, sigmas: Tensor) -> Iterator[Any]:
    """Gives a copy of a MODEL that reuses its deep levels in a sampling along sigmas [N + 1]; 1: the MODEL itself."""
    if interval == 1:
        yield model
        return
    reuse = FeatureReuse(interval, sigmas.tolist())
    model = model.clone()
    options = model.model_options
    model.model_options = {**options, "transformer_options": {**options.get("transformer_options", {}), REUSE: reuse}}
    try:
        yield model
    finally:
        reuse.clear()


def deep_features(options: dict[str, Any] | None, x: Tensor) -> DeepFeatures | None:
    """Returns the features of a call of the network on x, given ComfyUI's transformer_options; None without reuse.

    Conditionings have a `uuid` for the time of a sampling, and ComfyUI joins several in a call if memory allows it.
    """
    reuse: FeatureReuse | None = (options or {}).get(REUSE)
    if options is None or reuse is None or torch.compiler.is_compiling() or _is_patched(options):
        return None
    return reuse.call(float(options["sigmas"][0]), (*options["uuids"], x.shape, x.dtype, x.device))


def _is_patched(options: dict[str, Any]) -> bool:
    patches = options.get("patches", {})
    return any(patches.values()) or any(options.get(name) for name in PATCHES[1:])


def stop_reuse(guider: Any) -> Iterator[str]:
    """Yields the notice of a run that cannot reuse features, and makes all of its steps full."""
    options = guider.model_options.get("transformer_options", {})
    if REUSE not in options:
        return
    reason = ""
    if any("hooks" in cond for conds in guider.conds.values() for cond in conds):
        reason = "hooks change the model between steps"
    elif "denoise_mask_function" in guider.model_options:
        reason = "a node changes the mask between steps"
    elif guider.model_options.get("context_handler") is not None:
        reason = "context windows move between steps"
    if reason:
        del options[REUSE]
        yield f"reuse has no effect, because {reason}: set it to 1, or remove that node"


def unused_reuse(guider: Any, sigmas: Tensor) -> Iterator[str]:
    """Yields the notice of a run along sigmas [N + 1] in which no call could reuse features."""
    reuse = guider.model_options.get("transformer_options", {}).get(REUSE)
    if reuse is not None and not reuse.reused and len(sigmas) > 4:
        yield (
            "reuse had no effect, because another node patches Stage B, compiles it, or runs it several times a step: "
            "set it to 1, or remove that node"
        )
