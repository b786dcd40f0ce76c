"""Notices about nodes whose change to a MODEL has no effect on Würstchen, or ruins its images."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from typing import Any

import comfy.model_sampling
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...wuerstchen_core.common.text import listed
from .model_sampling import SIGMA_MAX
from .notices import notify

KEY = "wuerstchen_patches"
# Keys of transformer_options that other model families read, and the nodes that set them.
FOREIGN_OPTIONS = {"rope_options": "rotary position embeddings (ScaleROPE)"}


def add_patch_notices(patcher: Any, stage: str) -> None:
    """Makes a MODEL notify of other nodes' patches that do not fit it, at each sampling; `stage` is its name."""

    def sample(run: Callable[..., Tensor], noise: Tensor, latent: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        guider: Any = run.class_obj  # type: ignore[attr-defined]
        network = guider.model_patcher.model.diffusion_model
        for text in setup_notices(guider, args[1], stage):
            notify(text)
        network.patches.found, network.patches.used = found, used = set(), set()
        out = run(noise, latent, *args, **kwargs)
        if text := unused_notice(network, found, used, stage):
            notify(text)
        return out

    patcher.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, sample)


def setup_notices(guider: Any, sigmas: Tensor, stage: str) -> Iterator[str]:
    """Yields the notices that are known before a run of sigmas [N + 1]."""
    schedule = guider.model_patcher.get_model_object("model_sampling")
    options = guider.model_options.get("transformer_options", {})
    if not isinstance(schedule, comfy.model_sampling.StableCascadeSampling):
        yield (
            "a ModelSampling node replaced Würstchen's noise schedule: the image will be wrong, because the network's "
            "output is read as another quantity; remove that node"
        )
    elif sigmas.numel() and sigmas[0] > SIGMA_MAX * 1.01:
        yield (
            f"the sigmas start at {sigmas[0]:.0f}, above Würstchen's largest of {SIGMA_MAX:.0f}, so the image will be "
            "wrong: use Würstchen Scheduler or BasicScheduler instead of another model's scheduler"
        )
    if getattr(options.get("easycache"), "name", "") == "LazyCache":
        yield ("LazyCache skips steps of Würstchen that it must not skip, which ruins the image: use EasyCache instead")
    if names := [name for key, name in FOREIGN_OPTIONS.items() if options.get(key)]:
        yield f"{stage} has no {listed(names)}: a node that changes them has no effect here"


def unused_notice(network: Any, found: set[Hashable], used: set[Hashable], stage: str) -> str | None:
    """Returns the notice about the found patches that a run did not use."""
    parts = [
        " ".join(map(str, part)) if isinstance(part, tuple) else str(part) for part in sorted(found - used, key=str)
    ]
    if any(part[:2] == ("dit", "double_block") for part in used if isinstance(part, tuple)):
        parts = [part for part in parts if not part.startswith("dit single_block")]  # nodes that patch both by default
    if not parts:
        return None
    return f"a node patches {listed(parts)}, which {stage} does not have: no effect; it has {network.blocks_in_words()}"
