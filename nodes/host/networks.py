"""The core's networks with the host's layers and calling convention."""

from __future__ import annotations

from typing import Any

import comfy.ops
from torch import Tensor

from ...wuerstchen_core.models.decoder import Decoder, DecoderParams
from ...wuerstchen_core.models.layers import GlobalResponseNorm
from ...wuerstchen_core.models.prior import Prior, PriorParams


class CastGlobalResponseNorm(GlobalResponseNorm):
    """Brings its bare parameters to the input's device and dtype: in a partial load the host leaves them behind."""

    def affine(self, x: Tensor) -> tuple[Tensor, Tensor]:
        gamma, beta = (comfy.ops.cast_to_input(parameter, x) for parameter in (self.gamma, self.beta))
        return gamma, beta


def castable(operations: Any) -> Any:
    """The host's layer namespace, extended by the one layer with parameters that it does not have."""
    return type("Operations", (operations,), {"GlobalResponseNorm": CastGlobalResponseNorm})


class HostPrior(Prior):
    """Stage C as the host builds and calls it."""

    def __init__(self, params: PriorParams, *, operations: Any, device: Any = None, dtype: Any = None):
        super().__init__(params, operations=castable(operations), device=device, dtype=dtype)
        self.dtype = dtype

    def forward(self, x: Tensor, timestep: Tensor, context: Tensor, **_: Any) -> Tensor:  # type: ignore[override]
        return super().forward(x, timestep, context)


class HostDecoder(Decoder):
    """Stage B as the host builds and calls it; the prior's latents come under Stable Cascade's name."""

    def __init__(self, params: DecoderParams, *, operations: Any, device: Any = None, dtype: Any = None):
        super().__init__(params, operations=castable(operations), device=device, dtype=dtype)
        self.dtype = dtype

    def forward(  # type: ignore[override]
        self, x: Tensor, timestep: Tensor, context: Tensor, stable_cascade_prior: Tensor, **_: Any
    ) -> Tensor:
        return super().forward(x, timestep, stable_cascade_prior, context)
