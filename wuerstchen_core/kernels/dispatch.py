"""Decides between the fast paths and plain torch.

Every fast path calls one of these functions first. WUERSTCHEN_KERNELS=off in the environment, or `use_kernels(False)`,
makes all of them choose plain torch, whose results are equal up to rounding.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

_enabled = os.environ.get("WUERSTCHEN_KERNELS", "").lower() != "off"


def kernels_enabled() -> bool:
    """True unless the fast paths are switched off."""
    return _enabled


@contextmanager
def use_kernels(enabled: bool) -> Iterator[None]:
    """Switches all fast paths on or off within the block."""
    global _enabled
    before, _enabled = _enabled, enabled
    try:
        yield
    finally:
        _enabled = before


def accelerated_by(kernel: Callable[..., Tensor | None]) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Decorates a module's method written in plain torch.

    `kernel` gets the same arguments; the method runs only where the kernel returns None or kernels are switched off.
    """

    def decorate(method: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @wraps(method)
        def call(self: nn.Module, *args: Any) -> Tensor:
            out = kernel(self, *args) if _enabled else None
            return method(self, *args) if out is None else out

        return call

    return decorate


def _plain_cpu_tensors(*tensors: Tensor | None) -> bool:
    """True for plain tensors on a CPU, outside compilation, torch.func and forward-mode differentiation."""
    return (
        _enabled
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and all(x is None or (x.device.type == "cpu" and type(x) in (Tensor, nn.Parameter)) for x in tensors)
    )


def inference_on_cpu(*tensors: Tensor | None) -> bool:
    """True for CPU tensors of one dtype that need no gradients, outside autocast and compilation."""
    given = [x for x in tensors if x is not None]
    return (
        _plain_cpu_tensors(*given)
        and all(x.dtype == given[0].dtype for x in given)
        and not torch.is_autocast_enabled("cpu")
        and not (torch.is_grad_enabled() and any(x.requires_grad for x in given))
    )


def training_on_cpu(*tensors: Tensor | None) -> bool:
    """True for CPU tensors at least one of which needs gradients, outside compilation."""
    needs_grad = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    return needs_grad and _plain_cpu_tensors(*tensors)


class HasWeights:
    """Mixin for layers whose weights a kernel may use instead of calling the layer."""

    weight: Any
    bias: Any

    def weights(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns weight and bias, ready for use with x (in ComfyUI: patched, cast and on x's device)."""
        return self.weight, self.bias

    def packed(self, columns: int | None = None) -> Any:
        """Returns a linear layer's weight in int8 with its first `columns` packed (`PackedWeight`), or None."""
        return None


def is_plain(layer: nn.Module) -> bool:
    """True if calling the layer equals computing with its `weights`: not wrapped by an adapter, no hooks."""
    return isinstance(layer, HasWeights) and not has_hooks(layer)


def has_hooks(layer: nn.Module) -> bool:
    """True if the layer has hooks or its `forward` was replaced."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    forward = MethodType(type(layer).forward, layer)
    return vars(layer).get("forward", forward) != forward or any(getattr(layer, name) for name in hooks)
