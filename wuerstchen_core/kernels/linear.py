"""Linear layers with oneDNN on a CPU; they are most of the networks' work."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import inference_on_cpu, training_on_cpu

# The operator that inductor calls. It is private to torch: where it is missing, F.linear is used.
_LINEAR_POINTWISE = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


@cache
def _onednn_dtypes() -> tuple[torch.dtype, ...]:
    """Returns the dtypes that oneDNN multiplies on this processor."""
    if _LINEAR_POINTWISE is None or not torch.backends.mkldnn.is_available():
        return ()
    half = (torch.bfloat16,) if torch.ops.mkldnn._is_mkldnn_bf16_supported() else ()
    return (torch.float32, *half)


def uses_onednn(x: Tensor, *others: Tensor | None) -> bool:
    """True if `linear` multiplies these tensors with oneDNN."""
    return inference_on_cpu(x, *others) and bool(torch.backends.mkldnn.enabled) and x.dtype in _onednn_dtypes()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool = False) -> Tensor:
    """Returns F.linear of x [..., c_in] with weight [c_out, c_in], followed by GELU if `gelu`.

    In fp32, oneDNN takes half of MKL's time with AVX-512 on an AMD processor. In bf16 it needs neither a copy of the
    bias per result nor a separate GELU: 5 to 10 % of an MLP's two layers.
    """
    if uses_onednn(x, weight, bias):
        kind, algorithm = ("gelu", "none") if gelu else ("none", "")
        return _LINEAR_POINTWISE(x, weight, bias, kind, [], algorithm)  # type: ignore[misc]
    autocast = torch.is_autocast_enabled("cpu")
    if training_on_cpu(x, weight, bias) and x.ndim > 1 and x.numel() and (weight.dtype == x.dtype or autocast):
        if autocast and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype("cpu"))
        out: Tensor = _Linear.apply(x, weight, bias)
    else:
        out = F.linear(x, weight, bias)
    return F.gelu(out) if gelu else out


def cast_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Returns `linear` in x's dtype, inside autocast too."""
    with torch.autocast("cpu", enabled=False):
        return linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def weight_grad(grad: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the gradient [c_out, c_in] of a linear layer's weight, given that of its output and its input."""
    return cast_linear(grad.flatten(0, -2).t(), x.flatten(0, -2).t(), None).to(dtype)


def refuse_second_order() -> None:
    """Raises RuntimeError, in a kernel's backward pass, if that pass itself is to be differentiated."""
    if torch.is_grad_enabled():
        raise RuntimeError("the CPU kernels have no second derivatives (create_graph): set WUERSTCHEN_KERNELS=off")


class _Linear(torch.autograd.Function):
    """`linear` with gradients that use oneDNN as well, which halves their time in fp32.

    It stores no cast copy of the weight. autocast stores one of every weight until the backward pass, an eighth of the
    memory of training in bf16 without activations. Casting again takes 1 to 3 % of a full-size prior's step.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        x_needs_grad, weight_needs_grad, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if weight_needs_grad else None, weight if x_needs_grad else None)
        return cast_linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_order()
        x, weight = ctx.saved_tensors
        grad_x = None if weight is None else cast_linear(grad, weight.t(), None)
        grad_weight = None if x is None else weight_grad(grad, x, ctx.dtypes[0])
        grad_bias = grad.flatten(0, -2).sum(0).to(ctx.dtypes[1]) if ctx.needs_input_grad[2] else None
        return grad_x, grad_weight, grad_bias
