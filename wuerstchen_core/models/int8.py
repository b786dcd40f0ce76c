"""Networks whose linear layers hold their weights in int8; everything else stays in a floating-point dtype."""

from __future__ import annotations

from collections.abc import Iterator
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn

from ..common.devices import companion_dtype
from ..common.int8 import quantize_rows
from ..kernels.int8 import PackedWeight, frozen_linear, int8_linear
from .attention import split_projections
from .layers import TimestepBlock
from .operations import Linear

_LOCK = Lock()  # threads may share a network


class Int8Linear(Linear):
    """`Linear` with a weight [c_out, c_in] in int8 times `weight_scale` [c_out, 1].

    In training mode its product is exact and has gradients; a new layer is in evaluation mode.
    On a CPU the weight is packed at the first call and its plain form is let go: `weight` is on the meta device until
    the layer is saved, loaded, moved or copied. Loading a floating-point weight quantises it.
    """

    weight_scale: Tensor

    def __init__(self, c_in: int, c_out: int, bias: bool = True, *, device: Any = None, dtype: Any = None):
        nn.Module.__init__(self)
        self.in_features, self.out_features = c_in, c_out
        weight = torch.empty(c_out, c_in, device=device, dtype=torch.int8)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("weight_scale", torch.empty(c_out, 1, device=device))
        self.bias = nn.Parameter(torch.empty(c_out, device=device, dtype=dtype), requires_grad=False) if bias else None
        self._packed: PackedWeight | None = None
        self.eval()

    @classmethod
    def of(cls, layer: nn.Linear) -> Int8Linear:
        """Returns a layer with the weights of another, quantised."""
        weight = layer.weight
        out = cls(layer.in_features, layer.out_features, layer.bias is not None, device="meta", dtype=weight.dtype)
        if not weight.is_meta:
            out.load_state_dict(layer.state_dict(), assign=True)
        return out

    def restored(self, dtype: torch.dtype) -> Linear:
        """Returns a layer with the weights in a floating-point dtype."""
        with torch.device("meta"):
            out = Linear(self.in_features, self.out_features, self.bias is not None)
        weight, bias = self.weights(self.weight_scale.to(dtype))
        out.load_state_dict({"weight": weight} | ({} if bias is None else {"bias": bias}), assign=True)
        return out.requires_grad_(False)

    def weights(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns the restored weight and the bias in x's dtype."""
        weight = self.plain_weight().float().mul_(self.weight_scale).to(x.dtype)
        return weight, None if self.bias is None else self.bias.to(x.dtype)

    def packed(self, columns: int | None = None) -> PackedWeight:
        """Returns the weight as kernels multiply it, with the first `columns` (default: all) in oneDNN's order."""
        columns = self.in_features if columns is None else columns
        with _LOCK:
            if self._packed is None or self._packed.columns != columns:
                self.unpack()
                self._packed = PackedWeight(self.weight, self.weight_scale, self.bias, columns)
                self.weight = nn.Parameter(torch.empty_like(self.weight, device="meta"), requires_grad=False)
            return self._packed

    def plain_weight(self) -> Tensor:
        """Returns the weight in int8."""
        return self.weight if self._packed is None else self._packed.unpack()

    def unpack(self) -> None:
        """Makes `weight` the whole weight again."""
        if self._packed is not None:
            self.weight, self._packed = nn.Parameter(self.plain_weight(), requires_grad=False), None

    def forward(self, x: Tensor) -> Tensor:
        trains = torch.is_grad_enabled() and (x.requires_grad or self.training)
        return frozen_linear(self, x) if trains else int8_linear(self, x)

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> Any:
        self.unpack()
        scale = self.weight_scale
        super()._apply(fn, *args, **kwargs)
        self.weight_scale = scale.to(self.weight.device)  # which keeps its dtype
        return self

    def _save_to_state_dict(self, *args: Any) -> None:
        self.unpack()
        super()._save_to_state_dict(*args)

    def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, *args: Any) -> None:
        self.unpack()
        key = f"{prefix}weight"
        if key in state and state[key].is_floating_point():
            state[key], state[f"{key}_scale"] = quantize_rows(state[key])
        super()._load_from_state_dict(state, prefix, *args)

    def __getstate__(self) -> dict[str, Any]:  # for copies
        self.unpack()
        return vars(self).copy()


def int8_layers(network: nn.Module) -> Iterator[tuple[str, Int8Linear]]:
    """Yields the names and layers of a network that are in int8."""
    return ((name, layer) for name, layer in network.named_modules() if isinstance(layer, Int8Linear))


def is_int8(network: nn.Module) -> bool:
    """True if a network has layers in int8."""
    return any(True for _ in int8_layers(network))


def _children(network: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """Returns all modules below a network with their parents and their names there, so that they can be replaced."""
    return [(parent, name, child) for parent in network.modules() for name, child in parent.named_children()]


def use_int8(network: nn.Module) -> None:
    """Replaces the linear layers of a network by layers in int8, on the meta device too.

    The small products of time embeddings stay as they are. Packed projections become separate ones.
    """
    split_projections(network)
    for parent, name, layer in _children(network):
        if type(layer) is Linear and not isinstance(parent, TimestepBlock):
            setattr(parent, name, Int8Linear.of(layer))


def set_dtype(network: nn.Module, dtype: torch.dtype) -> None:
    """Converts a network to a dtype; with torch.int8, its linear layers, and the rest to `companion_dtype`."""
    if dtype == torch.int8:
        use_int8(network)
        dtype = companion_dtype(next(network.parameters()).device)
    else:
        for parent, name, layer in _children(network):
            if isinstance(layer, Int8Linear):
                setattr(parent, name, layer.restored(dtype))
    network.to(dtype)
