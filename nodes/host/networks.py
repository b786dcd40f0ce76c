"""The core's networks with the host's layers and calling convention."""

from __future__ import annotations

from typing import Any

import comfy.ops
import torch
from torch import Tensor

from ...wuerstchen_core.models.decoder import Decoder, DecoderParams
from ...wuerstchen_core.models.layers import Attention, GlobalResponseNorm
from ...wuerstchen_core.models.prior import Prior, PriorParams
from ...wuerstchen_core.models.token_decoder import TokenDecoder, TokenDecoderParams


class CastGlobalResponseNorm(GlobalResponseNorm):
    """Brings its bare parameters to the input's device and dtype: in a partial load the host leaves them behind."""

    def affine(self, x: Tensor) -> tuple[Tensor, Tensor]:
        gamma, beta = (comfy.ops.cast_to_input(parameter, x) for parameter in (self.gamma, self.beta))
        return gamma, beta


def castable(operations: Any) -> Any:
    """The host's layer namespace, with our layers in a form that it can cast and offload."""

    class Embedding(operations.Embedding):
        """Tokens say nothing of the dtype to compute in, without which fp8 would be read as it is."""

        def forward(self, tokens: Tensor) -> Tensor:
            return super().forward(tokens, out_dtype=torch.float32)

    # A bare matrix beside a layer, as the original's attention has it, is never offloaded: the weights come divided.
    own = {"GlobalResponseNorm": CastGlobalResponseNorm, "PackedAttention": Attention, "Embedding": Embedding}
    return type("Operations", (operations,), own)


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


class HostTokenDecoder(TokenDecoder):
    """v1's Stage B, called as v2's; its attention has the weights of the other networks' under their names."""

    def __init__(self, params: TokenDecoderParams, *, operations: Any, device: Any = None, dtype: Any = None):
        super().__init__(params, operations=castable(operations), device=device, dtype=dtype)
        self.dtype = dtype

    def forward(  # type: ignore[override]
        self, x: Tensor, timestep: Tensor, context: Tensor, stable_cascade_prior: Tensor, **_: Any
    ) -> Tensor:
        return super().forward(x, timestep, stable_cascade_prior, context)
