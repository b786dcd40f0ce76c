"""Exponential moving average (EMA) of a network's weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .sharding import shard_like


class EMA:
    """Moving average of a state dict, on the devices and with the sharding of its tensors."""

    def __init__(self, net: nn.Module, decay: float):
        self.decay = decay
        self.values = {key: x.detach().clone() for key, x in net.state_dict().items()}

    @torch.no_grad()
    def update(self, net: nn.Module, first: bool) -> None:
        """Updates the average. The `first` update copies the weights; integer buffers are always copied."""
        for key, x in net.state_dict().items():
            if first or not x.is_floating_point():
                self.values[key].copy_(x)
            else:
                self.values[key].lerp_(x, 1 - self.decay)

    @torch.no_grad()
    def load(self, values: Mapping[str, Tensor]) -> None:
        """Loads unsharded values. KeyError or RuntimeError if they belong to another network."""
        for key, x in self.values.items():
            x.copy_(shard_like(values[key], x))


def meta_copy(net: nn.Module) -> nn.Module:
    """Returns a copy in evaluation mode whose state dict is on the meta device: load it with `assign=True`.

    Tensors outside the state dict, such as the base weights of a LoRA, are shared with `net`.
    """
    memo: dict[int, Any] = {id(x): x for x in (*net.parameters(), *net.buffers())}
    for x in net.state_dict(keep_vars=True).values():
        empty = torch.empty_like(x, device="meta")
        memo[id(x)] = nn.Parameter(empty, requires_grad=False) if isinstance(x, nn.Parameter) else empty
    return copy.deepcopy(net, memo).eval().requires_grad_(False)
