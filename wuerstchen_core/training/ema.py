"""The moving average of a network's weights, which is what a training gives away."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .sharding import like


class EMA:
    """Exponential moving average of weights and buffers, wherever they are: on a device, or divided over several."""

    def __init__(self, net: nn.Module, decay: float):
        self.decay = decay
        self.values = {key: x.detach().clone() for key, x in net.state_dict().items()}

    def update(self, net: nn.Module, first: bool) -> None:
        """Take in the weights as they are now; the `first` are the average, and what isn't fractions has none."""
        with torch.no_grad():
            for key, x in net.state_dict().items():
                share = 1 - self.decay if x.is_floating_point() and not first else 1
                self.values[key].lerp_(x, share) if share < 1 else self.values[key].copy_(x)

    def load(self, values: Mapping[str, Tensor]) -> None:
        """Take over whole values. KeyError or RuntimeError if it is another network's."""
        with torch.no_grad():
            for key, x in self.values.items():
                x.copy_(like(values[key], x))


def meta_copy(net: nn.Module) -> nn.Module:
    """A copy of a network in evaluation mode, without memory for its state dict, which `worn` gives it.

    What a network leaves out of its state dict, as a LoRA's base is, both have in common.
    """
    memo: dict[int, Any] = {id(x): x for x in (*net.parameters(), *net.buffers())}
    memo |= {id(x): _bare(x) for x in net.state_dict(keep_vars=True).values()}
    return copy.deepcopy(net, memo).eval().requires_grad_(False)


def _bare(x: Tensor) -> Tensor:
    bare = torch.empty_like(x, device="meta")
    return nn.Parameter(bare, requires_grad=False) if isinstance(x, nn.Parameter) else bare


def load_into(bones: nn.Module, values: Mapping[str, Tensor]) -> nn.Module:
    """The skeleton with these values as its weights, which aren't copied."""
    bones.load_state_dict(values, assign=True)
    return bones
