"""Products by one matrix at every place, which are most of the networks' work: on a CPU by oneDNN."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

# What inductor calls, too; private to torch: where it is missing the plain product serves.
_LINEAR_POINTWISE = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


@cache
def _dtypes() -> tuple[torch.dtype, ...]:
    """What oneDNN multiplies on this processor."""
    if _LINEAR_POINTWISE is None or not torch.backends.mkldnn.is_available():
        return ()
    half = (torch.bfloat16,) if torch.ops.mkldnn._is_mkldnn_bf16_supported() else ()
    return (torch.float32, *half)


def ordinary_cpu(*tensors: Tensor | None) -> bool:
    """Whether these are ordinary tensors on a CPU, and nobody wants a graph or tangents of what is done with them."""
    return (
        not torch.compiler.is_compiling()
        and forward_ad._current_level < 0
        and all(x is None or (x.device.type == "cpu" and type(x) in (Tensor, nn.Parameter)) for x in tensors)
    )


def plain_cpu(*tensors: Tensor | None) -> bool:
    """Whether these are ordinary tensors on a CPU, of one dtype, of which nobody wants gradients or a graph."""
    given = [x for x in tensors if x is not None]
    return (
        ordinary_cpu(*given)
        and all(x.dtype == given[0].dtype for x in given)
        and not torch.is_autocast_enabled("cpu")
        and not (torch.is_grad_enabled() and any(x.requires_grad for x in given))
    )


def learning_cpu(*tensors: Tensor | None) -> bool:
    """Whether these are ordinary tensors on a CPU, of some of which somebody wants gradients."""
    wanted = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    return wanted and ordinary_cpu(*tensors)


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
    if (
        learning_cpu(x, weight, bias)
        and x.ndim > 1
        and x.numel()
        and (weight.dtype == x.dtype or torch.is_autocast_enabled("cpu"))
    ):
        out: Tensor = _Product.apply(_as_autocast(x), weight, bias)
    else:
        out = F.linear(x, weight, bias)
    return F.gelu(out) if gelu else out


def _as_autocast(x: Tensor) -> Tensor:
    """x in the dtype that autocast computes products in, if it is on."""
    if torch.is_autocast_enabled("cpu") and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype("cpu"))
    return x


def first_order(backward: Callable[[Any, Tensor], tuple[Tensor | None, ...]]) -> Callable[..., Any]:
    """A backward pass that has none of its own, and says so to who asks for gradients of gradients."""

    @wraps(backward)
    def passed(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "there are no gradients of gradients on a CPU, nor torch.func's: leave out create_graph, or use a GPU"
            )
        return backward(ctx, grad)

    return passed


class _Product(torch.autograd.Function):
    """`product` where gradients are wanted, which come by it as well: in fp32 that takes half of the time.

    No copy of its weight is kept: autocast keeps a copy of all weights in its dtype up to the backward pass, an eighth
    of what a training in bf16 takes without its activations. Casting them again takes 1 to 3 % of a step of a
    full-size prior.
    """

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return product(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, bias = inputs
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        of_x, of_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if of_weight else None, weight if of_x else None)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x = None if weight is None else back_through(grad, weight)
        of_weight = None if x is None else of_weights(grad, x, ctx.dtypes[0])
        of_bias = grad.flatten(0, -2).sum(0).to(ctx.dtypes[1]) if ctx.needs_input_grad[2] else None
        return of_x, of_weight, of_bias


def back_through(grad: Tensor, weight: Tensor) -> Tensor:
    """The gradient [..., c_in] of a product's input, by that [..., c_out] of its output."""
    with torch.autocast("cpu", enabled=False):  # where a caller is in it still
        return product(grad, weight.to(grad.dtype).t(), None)


def of_weights(grad: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient [c_out, c_in] of a product's weight, by that [..., c_out] of its output and its input."""
    with torch.autocast("cpu", enabled=False):
        return product(grad.flatten(0, -2).t(), x.flatten(0, -2).t(), None).to(dtype)


class Ready:
    """A layer whose weights can be asked for."""

    weight: Any
    bias: Any

    def ready(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weight and bias as they are multiplied with x (the host's: patched, cast and on its device)."""
        return self.weight, self.bias


def bare(layer: nn.Module) -> bool:
    """Whether a layer is its weights' product and nothing else: no adapter wraps it, and nobody listens to it."""
    return isinstance(layer, Ready) and not heard(layer)


def heard(layer: nn.Module) -> bool:
    """Whether somebody listens to a layer, or has put something in its place."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return "forward" in vars(layer) or any(getattr(layer, name) for name in hooks)


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
