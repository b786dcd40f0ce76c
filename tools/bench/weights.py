"""Seeded random weights of full-size networks, in memory."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from wuerstchen_core.checkpoints.components import COMPONENTS, Params
from wuerstchen_core.models.decoder import DecoderParams
from wuerstchen_core.models.prior import PriorParams
from wuerstchen_core.models.vqgan import VQGANParams


@dataclass(frozen=True)
class ModelSizes:
    """Parameters of the networks; the defaults are those of the released v2."""

    prior: PriorParams = field(default_factory=PriorParams)
    decoder: DecoderParams = field(default_factory=DecoderParams)
    vqgan: VQGANParams = field(default_factory=VQGANParams)

    def of(self, part: str) -> Params:
        params: Params = getattr(self, part)
        return params


def random_state(part: str, sizes: ModelSizes, dtype: torch.dtype, device: Any = "cpu") -> dict[str, Tensor]:
    """Returns the weights of one network, the same at each call. They are never written to a file."""
    shapes = _shapes(part, sizes)
    # Every tensor is a slice of one pool: drawing a billion numbers would take longer than measuring.
    largest = max(x.numel() for x in shapes.values())
    pool = torch.randn(2 * largest + 1, generator=torch.Generator().manual_seed(0)).to(dtype)
    state, offset = {}, 0
    for key, x in shapes.items():
        state[key] = _random_tensor(key, x, pool, offset).to(device)
        offset += x.numel()
    return state


@lru_cache
def _shapes(part: str, sizes: ModelSizes) -> dict[str, Tensor]:
    with torch.device("meta"):
        return dict(COMPONENTS[part].network(sizes.of(part)).state_dict())


def _random_tensor(key: str, like: Tensor, pool: Tensor, offset: int) -> Tensor:
    """Returns a weight scaled so that every layer changes the output and activations stay near 1."""
    if not like.is_floating_point():  # BatchNorm's counter
        return torch.zeros(like.shape, dtype=like.dtype)
    start = offset % (len(pool) - like.numel())
    values = pool[start : start + like.numel()].view(like.shape)
    if key.endswith("running_var") or (like.dim() == 1 and key.endswith(".weight")):  # scale of a norm
        return 1 + 0.1 * values.tanh()
    if key.endswith((".gamma", ".gammas")):
        return 0.3 * values
    if like.dim() == 1 or key.endswith(".beta"):
        return 0.1 * values
    gain = 0.5 if key.endswith(("channelwise.4.weight", "to_out.0.weight")) else 1.0
    if key.startswith(("out.", "clf.")):  # the noise is divided by their outputs
        gain = 0.1
    return values * (gain / math.sqrt(like[0].numel()))
