"""Notices about sampler settings of ComfyUI and image sizes that are known to harm the image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from ...wuerstchen_core.common.geometry import size_note

# ComfyUI's samplers that add no noise in their steps (`ddim` is its `euler`); other packs' samplers are not judged.
# The author of Stable Cascade's Stage B says that it needs an ancestral sampler (ComfyUI issue 5297). The shipped model
# works as well without one: docs/samplers.md.
DETERMINISTIC = frozenset(
    "deis dpm_2 dpm_adaptive dpm_fast dpmpp_2m dpmpp_2m_cfg_pp euler euler_cfg_pp exp_heun_2_x0 gradient_estimation "
    "gradient_estimation_cfg_pp heun heunpp2 ipndm ipndm_v lms res_multistep res_multistep_cfg_pp unipc "
    "unipc_bh2".split()
)
LAST_SIGMA = 3.0  # largest sound sigma before 0: two steps of `simple` have 1, twenty of linear_quadratic 18

NO_NEW_NOISE = (
    "Stage B was given a sampler that adds no noise in its steps, which may cause artifacts with the released weights: "
    "use ddpm, euler_ancestral, or SamplerCustom with Würstchen Sampler"
)
STOPS_EARLY = (
    "Stage C was given sigmas that end far above 0, as those of linear_quadratic do, which distorts the image: "
    "use another scheduler, such as simple"
)
NOT_FINITE = (
    "Würstchen was given sigmas that are not finite, so the image will be black: use another scheduler, such as "
    "simple, or more steps"
)

UNCONVERTED = ("real_dataset", "bucket_latents")  # of Train LoRA's sampler, which forgets their `process_latent_in`
SEVERAL_SIZES = (
    "Train LoRA got latents of several sizes or has bucket_mode on, for which ComfyUI trains on wrongly scaled "
    "latents: resize the pictures to one size, and turn bucket_mode off"
)


def sampler_notices(model: Any, sampler: Any, sigmas: Tensor, shape: Sequence[int]) -> Iterator[str]:
    """Yields the notices about a run of a StageModel from noise of a shape, with a SAMPLER along sigmas [N + 1].

    Raises ValueError for what Train LoRA would train wrongly.
    """
    if any(getattr(sampler, name, None) is not None for name in UNCONVERTED):
        raise ValueError(SEVERAL_SIZES)
    if text := warning(sampler, sigmas, ancestral=model.stage == "Stage B"):
        yield text
    if model.trained and (text := size_note(model.trained, *shape[-2:])):
        yield text


def warning(sampler: Any, sigmas: Tensor, ancestral: bool) -> str | None:
    """Returns the warning for a SAMPLER and sigmas [N + 1], or None; an `ancestral` stage needs noise in its steps."""
    if not sigmas.isfinite().all():
        return NOT_FINITE
    if len(sigmas) <= 2:  # a single step is a deliberate choice
        return None
    if not ancestral:
        return STOPS_EARLY if sigmas[-1] == 0 and sigmas[-2] > LAST_SIGMA else None
    function = getattr(sampler, "sampler_function", None)
    name = getattr(function, "__name__", "").removeprefix("sample_").removesuffix("_function")
    options = getattr(sampler, "extra_options", {})  # make some of these samplers add noise
    return None if options.get("eta") or options.get("s_churn") or name not in DETERMINISTIC else NO_NEW_NOISE
