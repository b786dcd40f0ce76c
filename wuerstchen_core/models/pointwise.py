"""Products by one matrix at every place, which are most of the networks' work: on a CPU by oneDNN."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# What inductor calls, too; private to torch: where it is missing the plain product serves.
_LINEAR_POINTWISE = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


@cache
def _dtypes() -> tuple[torch.dtype, ...]:
    """What oneDNN multiplies on this processor."""
    if _LINEAR_POINTWISE is None or not torch.backends.mkldnn.is_available():
        return ()
    half = (torch.bfloat16,) if torch.ops.mkldnn._is_mkldnn_bf16_supported() else ()
    return (torch.float32, *half)


def plain_cpu(*tensors: Tensor | None) -> bool:
    """Whether these are ordinary tensors on a CPU, of one dtype, of which nobody wants gradients or a graph."""
    given = [x for x in tensors if x is not None]
    return (
        given[0].device.type == "cpu"
        and all(type(x) in (Tensor, nn.Parameter) and x.dtype == given[0].dtype for x in given)
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and not (torch.is_grad_enabled() and any(x.requires_grad for x in given))
    )


def by_onednn(x: Tensor, *others: Tensor | None) -> bool:
    """Whether `product` multiplies these by oneDNN."""
    return plain_cpu(x, *others) and bool(torch.backends.mkldnn.enabled) and x.dtype in _dtypes()


def product(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool = False) -> Tensor:
    """x [..., c_in] times weight [c_out, c_in], plus bias, and its GELU if asked.

    By oneDNN on a CPU, even in fp32: with AVX-512 on an AMD processor that takes half of MKL's time. In bf16 it saves
    a copy of the bias for each result, and the pass of the GELU: 5 to 10 % of both products of an MLP.
    """
    if by_onednn(x, weight, bias):
        kind, algorithm = ("gelu", "none") if gelu else ("none", "")
        return _LINEAR_POINTWISE(x, weight, bias, kind, [], algorithm)  # type: ignore[misc]
    out = F.linear(x, weight, bias)
    return F.gelu(out) if gelu else out


class Ready:
    """A layer whose weights can be asked for."""

    weight: Any
    bias: Any

    def ready(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weight and bias as they are multiplied with x (the host's: patched, cast and on its device)."""
        return self.weight, self.bias


def bare(layer: nn.Module) -> bool:
    """Whether a layer is its weights' product and nothing else: no adapter wraps it, and nobody listens to it."""
    return (
        isinstance(layer, Ready)
        and "forward" not in vars(layer)
        and not layer._forward_hooks | layer._forward_pre_hooks
    )


class Linear(Ready, nn.Linear):
    """`nn.Linear`, by `product`."""

    def forward(self, x: Tensor) -> Tensor:
        return product(x, *self.ready(x))


class Conv2d(Ready, nn.Conv2d):
    """`nn.Conv2d`."""


class Embedding(nn.Embedding):
    """`nn.Embedding`, but that none without memory is drawn: torch would import its compiler for it, 890 modules (the
    load of Stage A: 1.1 s and 80 MB with them, 0.04 s and 1 MB without)."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


class Operations:
    """The layers that networks are made of, unless they are told others."""

    Linear = Linear
    Conv2d = Conv2d
    ConvTranspose2d = nn.ConvTranspose2d
    Embedding = Embedding
