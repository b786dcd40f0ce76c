"""One line in the log, once a loaded model, where a choice of the host's sampling is known to harm."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from comfy.patcher_extension import WrappersMP
from torch import Tensor

logger = logging.getLogger(__name__)

KEY = "wuerstchen_advice"

# Where its author says of the Stage B of Stable Cascade, Würstchen's successor, that it needs an ancestral sampler:
# ComfyUI issue 5297. The shipped model paints as well without: docs/samplers.md.
#
# The host's samplers whose steps add no new noise (`ddim` is its `euler`). Other packs' samplers are not judged.
DETERMINISTIC = frozenset(
    "deis dpm_2 dpm_adaptive dpm_fast dpmpp_2m dpmpp_2m_cfg_pp euler euler_cfg_pp exp_heun_2_x0 gradient_estimation "
    "gradient_estimation_cfg_pp heun heunpp2 ipndm ipndm_v lms res_multistep res_multistep_cfg_pp unipc "
    "unipc_bh2".split()
)


NO_NEW_NOISE = (
    "Stage B was given a sampler that adds no new noise in its steps, without which the released weights may paint "
    "artifacts: take ddpm, euler_ancestral, or SamplerCustom with Würstchen Sampler"
)
STOPS_EARLY = (
    "Stage C was given noise levels that stop high above the picture, as those of linear_quadratic do, and things come "
    "out wrong: take another scheduler, such as simple"
)
LAST_LEVEL = 3.0  # where a single last step is too far; two steps of `simple` have 1, twenty of linear_quadratic 18
NO_NUMBERS = (
    "Würstchen was given noise levels that are no numbers, and its picture will be black: take another scheduler, "
    "such as simple, or more steps"
)


def advise(patcher: Any, ancestral: bool) -> None:
    """Make a MODEL say what harms it; `ancestral`: it is Stage B, which needs the noise that ancestral samplers add."""
    said: set[str] = set()  # shared with the clones that the host makes of the patcher

    def sample(
        run: Callable[..., Tensor], noise: Tensor, latent: Tensor, sampler: Any, sigmas: Tensor, *args: Any, **more: Any
    ) -> Tensor:
        line = remark(sampler, sigmas, ancestral)
        if line and line not in said:
            said.add(line)
            logger.warning(line)
        return run(noise, latent, sampler, sigmas, *args, **more)

    patcher.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, sample)


def remark(sampler: Any, sigmas: Tensor, ancestral: bool) -> str | None:
    """What is to be said of a SAMPLER and the noise levels [N + 1] that it is to walk along."""
    if not sigmas.isfinite().all():
        return NO_NUMBERS
    if len(sigmas) <= 2:  # whoever asks for one step knows
        return None
    if not ancestral:
        return STOPS_EARLY if sigmas[-1] == 0 and sigmas[-2] > LAST_LEVEL else None
    function = getattr(sampler, "sampler_function", None)
    name = getattr(function, "__name__", "").removeprefix("sample_").removesuffix("_function")
    options = getattr(sampler, "extra_options", {})  # with which some of them do add noise
    return None if options.get("eta") or options.get("s_churn") or name not in DETERMINISTIC else NO_NEW_NOISE
