"""Gathers tensors that FSDP has sharded over processes, and shards them again. Plain tensors pass unchanged.

torch.distributed.checkpoint.state_dict has functions for this, but none for an average of the weights, and they refuse
some optimizers (torch 2.14: SGD, Prodigy, schedule-free ones).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map

DEVICE_OPTIONS = ("fused", "foreach")  # of an optimizer's groups; they depend on the device


def gather(tree: Any, keep: bool = True) -> Any:
    """Returns nested containers with sharded tensors gathered on the CPU; all processes must call this.

    Without `keep`, tensors become None: only the main process needs them.
    """

    def join(x: Any) -> Any:
        if isinstance(x, DTensor):
            x = x.full_tensor().cpu()
        return x if keep else None

    return tree_map(join, tree)


def shard_like(x: Any, other: Tensor) -> Any:
    """Returns x sharded like `other`, or x itself if `other` is not sharded or has another shape."""
    if isinstance(other, DTensor) and isinstance(x, Tensor) and x.shape == other.shape:
        return distribute_tensor(x, other.device_mesh, other.placements)
    return x


def load_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Loads an unsharded state dict and shards it like the weights. `DEVICE_OPTIONS` keep the optimizer's values."""
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    state = {i: {key: shard_like(x, weights[i]) for key, x in values.items()} for i, values in saved["state"].items()}
    groups = [
        {**group, **{key: current[key] for key in DEVICE_OPTIONS if key in current}}
        for group, current in zip(saved["param_groups"], optimizer.param_groups, strict=True)
    ]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
