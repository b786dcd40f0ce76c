"""Tensors that are divided over processes (FSDP's), put together and divided again; others pass as they are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map

WAYS = ("fused", "foreach")  # of an optimizer's groups: what goes with the device, not with the training


def whole(tree: Any, keep: bool = True) -> Any:
    """Nested containers with every tensor in one piece, for which all processes must ask; None where it isn't kept."""

    def join(x: Any) -> Any:
        if isinstance(x, DTensor):
            x = x.full_tensor().cpu()
        return x if keep else None

    return tree_map(join, tree)


def like(x: Any, other: Tensor) -> Any:
    """x, which may be whole, divided as `other` is, if it has its shape."""
    if isinstance(other, DTensor) and isinstance(x, Tensor) and x.shape == other.shape:
        return distribute_tensor(x, other.device_mesh, other.placements)
    return x


def load_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Take over the whole state dict of an optimizer, dividing its tensors as the weights are; how it computes is its
    own."""
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    state = {i: {key: like(x, weights[i]) for key, x in values.items()} for i, values in saved["state"].items()}
    ways = [{key: group[key] for key in WAYS if key in group} for group in optimizer.param_groups]
    groups = [{**group, **way} for group, way in zip(saved["param_groups"], ways, strict=True)]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
