"""What a stage is given: seeded, the same for both sides."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from wuerstchen_core.common.devices import DTYPES
from wuerstchen_core.common.geometry import decoder_side, prior_side
from wuerstchen_core.inference.settings import SamplingSettings

from .cases import PICTURE, STAGES, Case
from .weights import Sizes

TOKENS = 77
PRIOR_GUIDANCE, DECODER_GUIDANCE = 4.0, 2.0
SEED = 7  # of the samplers' noise, too
Inputs = dict[str, Tensor]


def inputs(case: Case, sizes: Sizes, device: Any, dtype: torch.dtype | None = None) -> Inputs:
    """The tensors of a case by name, in `dtype` (None: the case's, in whose numbers they are drawn in any case)."""
    draw = _drawer(case, device, dtype)
    prior, latent = prior_side(case.side), decoder_side(case.side)
    features = (sizes.decoder.effnet_embd, prior, prior)
    if case.stage in ("vqgan-encode", "image-encoder"):
        return {"images": draw(case.batch, 3, case.side, case.side).sigmoid()}
    if case.stage == "vqgan-decode":
        return {"latents": draw(case.batch, sizes.vqgan.c_latent, latent, latent) * sizes.vqgan.scale_factor}
    found: Inputs = {}
    if case.stage in ("prior", PICTURE):
        found["prior_text"] = draw(case.batch, TOKENS, sizes.prior.c_cond)
        found["prior_negative"] = draw(1, TOKENS, sizes.prior.c_cond)
    if case.stage != "prior":
        found["text"] = draw(case.batch, TOKENS, sizes.decoder.clip_embd)
        found["negative"] = draw(1, TOKENS, sizes.decoder.clip_embd)
    if case.stage.startswith("decoder"):
        found["features"] = draw(case.batch, *features)
    return found


def one_call(case: Case, sizes: Sizes, device: Any, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
    """The arguments (x, t, ...) of one call of a step's network, in the order of ours; `dtype` as for `inputs`."""
    draw = _drawer(case, device, dtype)
    rows, prior, latent = case.rows, prior_side(case.side), decoder_side(case.side)
    t = torch.full((rows,), 0.5, device=device, dtype=dtype or DTYPES[case.dtype])
    if STAGES[case.stage].parts == ("prior",):
        return draw(rows, sizes.prior.c_in, prior, prior), t, draw(rows, TOKENS, sizes.prior.c_cond)
    features = draw(rows, sizes.decoder.effnet_embd, prior, prior)
    return draw(rows, sizes.decoder.c_in, latent, latent), t, features, draw(rows, TOKENS, sizes.decoder.clip_embd)


def sampling(case: Case, prior_steps: int, decoder_steps: int) -> SamplingSettings:
    """What our samplers are told, in equal steps."""
    guidance = DECODER_GUIDANCE if case.stage == "decoder-guided" else 1.0
    return SamplingSettings(
        case.side, case.side, "linear", prior_steps, PRIOR_GUIDANCE, decoder_steps, decoder_guidance=guidance
    )


def _drawer(case: Case, device: Any, dtype: torch.dtype | None) -> Any:
    generator = torch.Generator().manual_seed(SEED)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(DTYPES[case.dtype]).to(device, dtype)

    return draw
