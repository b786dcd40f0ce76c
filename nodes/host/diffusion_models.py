"""The core's networks built from ComfyUI's layers and called with ComfyUI's arguments."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import comfy.ops
import torch
from torch import Tensor, nn

from ...wuerstchen_core.kernels.dispatch import HasWeights
from ...wuerstchen_core.kernels.linear import linear, uses_onednn
from ...wuerstchen_core.models.attention import Attention
from ...wuerstchen_core.models.decoder import Decoder
from ...wuerstchen_core.models.layers import GlobalResponseNorm
from ...wuerstchen_core.models.prior import KVCache, Prior
from ...wuerstchen_core.models.token_decoder import TokenDecoder


class CastGlobalResponseNorm(GlobalResponseNorm):
    """Moves its parameters to the input's device and dtype, since ComfyUI's partial load offloads only layers."""

    def weights(self, x: Tensor) -> tuple[Tensor, Tensor]:
        gamma, beta = (comfy.ops.cast_to_input(parameter, x) for parameter in (self.gamma, self.beta))
        return gamma, beta


def castable(operations: Any) -> Any:
    """Returns ComfyUI's layer namespace extended by our layers, in a form that ComfyUI can cast and offload."""

    class Cast(HasWeights):
        def weights(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
            weight, bias = comfy.ops.cast_bias_weight(self, x)
            return weight, bias

    class Linear(Cast, operations.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return linear(x, *self.weights(x)) if uses_onednn(x) else super().forward(x)

    class Conv2d(Cast, operations.Conv2d):
        pass

    class Embedding(operations.Embedding):
        """Casts fp8 weights to fp32: integer tokens tell ComfyUI no dtype to compute in."""

        def forward(self, tokens: Tensor) -> Tensor:
            return super().forward(tokens, out_dtype=torch.float32)

    # Attention has q, k and v as separate layers: the original's packed matrix is a bare parameter, never offloaded.
    own = {
        "GlobalResponseNorm": CastGlobalResponseNorm,
        "PackedAttention": Attention,
        "Linear": Linear,
        "Conv2d": Conv2d,
        "Embedding": Embedding,
    }
    return type("Operations", (operations,), own)


class HostNetwork(nn.Module):
    """Mixin that gives a network of the core the constructor that ComfyUI calls."""

    def __init__(self, params: Any, *, operations: Any, device: Any = None, dtype: Any = None):
        super().__init__(params, operations=castable(operations), device=device, dtype=dtype)
        self.dtype = dtype


class HostPrior(HostNetwork, Prior):
    """Stage C."""

    kv_cache: KVCache | None = None  # ComfyUI passes the same text in a new tensor at each step

    def forward(self, x: Tensor, timestep: Tensor, context: Tensor, **_: Any) -> Tensor:  # type: ignore[override]
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or self.kv_cache is None:
            return super().forward(x, timestep, context)
        return super().forward(x, timestep, self.kv_cache(context))

    @contextmanager
    def caching_keys_values(self) -> Iterator[None]:
        """Computes keys and values once per text; the weights must not change meanwhile."""
        self.kv_cache = KVCache(self)
        try:
            yield
        finally:
            self.kv_cache = None


class HostStageB(HostNetwork):
    """Mixin for Stage B; ComfyUI passes Stage C's latents under Stable Cascade's name."""

    def forward(self, x: Tensor, timestep: Tensor, context: Tensor, stable_cascade_prior: Tensor, **_: Any) -> Tensor:
        return super().forward(x, timestep, stable_cascade_prior, context)


class HostDecoder(HostStageB, Decoder):  # type: ignore[misc]
    """Stage B of v2."""


class HostTokenDecoder(HostStageB, TokenDecoder):  # type: ignore[misc]
    """Stage B of v1, with the attention keys of the other networks."""
