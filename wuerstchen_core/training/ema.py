"""Exponential moving average (EMA) of a network's weights."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
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


class CurrentWeights:
    """Takes the place of `EMA` and stores nothing: its values are the weights, or the optimizer's own average of them.

    Schedule-free optimizers (arXiv 2405.15682) have such an average, which their `eval` puts in place of the weights.
    """

    def __init__(self, net: nn.Module, optimizers: Iterable[torch.optim.Optimizer]):
        self._net = net
        self._averaging: list[Any] = [x for x in optimizers if averages(type(x))]
        for optimizer in self._averaging:
            optimizer.train()

    @property
    @torch.no_grad()
    def values(self) -> dict[str, Tensor]:
        """The weights, which share memory with the network, or copies of the average."""
        weights: dict[str, Tensor] = self._net.state_dict()
        if not self._averaging:
            return weights
        trained = {key: x.clone() for key, x in weights.items()}
        for optimizer in self._averaging:
            optimizer.eval()
        average = {key: x.clone() for key, x in weights.items()}
        for optimizer in self._averaging:
            optimizer.train()
        for key, x in weights.items():
            x.copy_(trained[key])  # which `train` restores up to rounding
        return average

    def update(self, net: nn.Module, first: bool) -> None:
        """Does nothing."""

    def load(self, values: Mapping[str, Tensor]) -> None:
        """Does nothing: the values follow from the weights and the optimizers."""


def averages(optimizer: type) -> bool:
    """True if a class of optimizers keeps an average of the weights."""
    return hasattr(optimizer, "eval") and hasattr(optimizer, "train")


def meta_copy(net: nn.Module) -> nn.Module:
    """Returns a copy in evaluation mode whose state dict is on the meta device: load it with `assign=True`.

    Tensors outside the state dict, such as the base weights of a LoRA, are shared with `net`.
    """
    memo: dict[int, Any] = {id(x): x for x in (*net.parameters(), *net.buffers())}
    for x in net.state_dict(keep_vars=True).values():
        empty = torch.empty_like(x, device="meta")
        memo[id(x)] = nn.Parameter(empty, requires_grad=False) if isinstance(x, nn.Parameter) else empty
    return copy.deepcopy(net, memo).eval().requires_grad_(False)
