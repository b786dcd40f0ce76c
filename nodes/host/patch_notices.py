"""Notices about nodes whose change to a MODEL has no effect on Würstchen, or ruins its images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import comfy.model_sampling
import comfy.utils
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...wuerstchen_core.common.text import listed
from .conditioning import PRIOR_KEY

NO_PRIOR = (
    "Stage B gets an additional text without Stage C latents, so guidance leads away from the image: connect Würstchen "
    "Decoder Conditioning to that conditioning too"
)


def setup_notices(guider: Any, sigmas: Tensor, shape: Sequence[int]) -> Iterator[str]:
    """Yields the notices known before a run from noise of a shape, along sigmas [N + 1].

    Raises ValueError for what cannot run.
    """
    stage = guider.model_patcher.model.stage
    schedule = guider.model_patcher.get_model_object("model_sampling")
    options = guider.model_options.get("transformer_options", {})
    if not isinstance(schedule, comfy.model_sampling.StableCascadeSampling):
        yield (
            "a ModelSampling node replaced Würstchen's noise schedule: the image will be wrong, because the network's "
            "output is read as another quantity; remove that node"
        )
    elif len(sigmas) > 2 and (sigmas[:-1] == sigmas[0]).all():
        yield (
            f"all sigmas are {sigmas[0]:.0f}, as SDTurboScheduler's are with this model, so the image will be wrong: "
            "use Würstchen Scheduler or BasicScheduler"
        )
    if getattr(options.get("easycache"), "name", "") == "LazyCache":
        yield "LazyCache skips steps of Würstchen that it must not skip, which ruins the image: use EasyCache instead"
    if "hidream_o1_patch_seam_smoothing" in options.get("wrappers", {}).get(WrappersMP.DIFFUSION_MODEL, {}):
        yield f"a node smooths the seams of HiDream-O1's patches, which {stage} does not have: remove that node"
    for name in guider.model_patcher.object_patches:
        _check_exists(guider.model_patcher.model, name)
    handler = guider.model_options.get("context_handler")
    if handler is not None:
        yield from _context_notices(handler, shape, stage)
        if shape[handler.dim] > handler.context_length and any("control" in cond for cond in _conditionings(guider)):
            raise ValueError("a ControlNet's hint is for the whole image: remove it, or the node with context windows")
    if stage == "Stage B":
        others = [name for name in guider.conds if name not in ("positive", "negative")]
        if any(PRIOR_KEY not in cond for name in others for cond in guider.conds[name]):
            yield NO_PRIOR


def _conditionings(guider: Any) -> Iterator[Any]:
    """Yields all conditionings of a run."""
    return (cond for conds in guider.conds.values() for cond in conds)


def _check_exists(model: Any, name: str) -> None:
    """Raises ValueError unless a MODEL has the object that a node replaces."""
    try:
        comfy.utils.get_attr(model, name)
    except AttributeError:
        raise ValueError(
            f"a node replaces {name}, which Würstchen does not have: remove the node, which is made for another family"
        ) from None


def _context_notices(handler: Any, shape: Sequence[int], stage: str) -> Iterator[str]:
    """Yields the notice about ComfyUI's context windows; ValueError if they would cut channels or Stage B's latents."""
    if handler.dim not in (0, 2, 3):
        raise ValueError(
            f"context windows along dimension {handler.dim} do not fit Würstchen's latents [batch, channels, height, "
            "width]: use dimension 0 (batch), or with Stage C also 2 or 3"
        )
    if shape[handler.dim] <= handler.context_length:
        yield (
            f"context windows of {handler.context_length} have no effect on latents of {shape[handler.dim]} along "
            f"dimension {handler.dim}"
        )
    elif stage == "Stage B" and handler.dim:
        raise ValueError(
            "Stage B cannot be sampled in context windows, whose edges are not those of its blocks and of Stage C's "
            "latents: use them with Stage C or along the batch (dimension 0), or remove them here"
        )


def result_notices(guider: Any) -> Iterator[str]:
    """Yields the notices about patches that had no effect in a run."""
    model = guider.model_patcher.model
    patches = model.diffusion_model.patches
    if text := unused_notice(model.diffusion_model, model.stage):
        yield text
    options = guider.model_options.get("transformer_options", {})
    if "easycache" in options and 0 < patches.calls == patches.runs:
        yield "EasyCache skipped no step: raise its reuse_threshold, to 0.75 for 20 steps or more, or remove it"


def unused_notice(network: Any, stage: str) -> str | None:
    """Returns the notice about patches that a run found but did not use."""
    found, used = network.patches.found, network.patches.used
    parts = [
        " ".join(map(str, part)) if isinstance(part, tuple) else str(part) for part in sorted(found - used, key=str)
    ]
    if any(part[:2] == ("dit", "double_block") for part in used if isinstance(part, tuple)):
        parts = [part for part in parts if not part.startswith("dit single_block")]  # nodes that patch both by default
    if not parts:
        return None
    return (
        f"a node patches {listed(parts)}, which {stage} does not have, so it has no effect: remove that node, or "
        f"choose from {network.blocks_in_words()}"
    )
