"""The wrappers around each sampling of a MODEL: checks and notices, areas and masks, and a prior's keys and values."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from itertools import chain
from typing import Any

from comfy.patcher_extension import WrappersMP
from torch import Tensor

from .conditioning import check_options, fit_areas
from .control import prepare_controls
from .diffusion_models import HostPrior
from .feature_reuse import stop_reuse, unused_reuse
from .notices import notify
from .patch_notices import result_notices, setup_notices
from .sampler_warnings import sampler_notices

KEY = "wuerstchen"


def add_wrappers(patcher: Any) -> None:
    """Adds the wrappers to a MODEL, whichever node samples it.

    ComfyUI assumes 8 pixels per latent, crops areas that Stage B cannot halve, and loses masks thinner than a cell.
    """
    patcher.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, _outer_sample)
    patcher.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, KEY, _sampler_sample)


def _outer_sample(
    run: Callable[..., Tensor], noise: Tensor, latent: Tensor, sampler: Any, sigmas: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    guider: Any = run.class_obj  # type: ignore[attr-defined]
    model = guider.model_patcher.model
    network = model.diffusion_model
    conditioning = list(chain.from_iterable(guider.conds.values()))
    check_options(model.stage, conditioning)
    for text in chain(
        prepare_controls(conditioning, model.model_sampling, sigmas, noise.shape),
        sampler_notices(model, sampler, sigmas, noise.shape),
        setup_notices(guider, sigmas, noise.shape),
        stop_reuse(guider),
    ):
        notify(text)
    fit_areas(guider, noise)
    hooked = any("hooks" in cond for conds in guider.conds.values() for cond in conds)  # these patch it between steps
    network.patches.clear()
    with network.caching_keys_values() if isinstance(network, HostPrior) and not hooked else nullcontext():
        out = run(noise, latent, sampler, sigmas, *args, **kwargs)
    for text in chain(result_notices(guider), unused_reuse(guider, sigmas)):
        notify(text)
    return out


def _sampler_sample(run: Callable[..., Tensor], guider: Any, *args: Any, **kwargs: Any) -> Tensor:
    patches = guider.inner_model.diffusion_model.patches
    patches.sampling = True
    try:
        return run(guider, *args, **kwargs)
    finally:
        patches.sampling = False
