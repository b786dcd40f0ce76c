"""Checks that weights fit their network. `inspect`, `convert` and everything that loads weights use this one check."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch

from ..common.text import listed
from .components import Part, component

Expected = Mapping[str, tuple[torch.Size, bool]]  # shape of each tensor, and True if it is floating-point

# Raised by networks that are built with sizes that cannot be.
_IMPOSSIBLE = (ValueError, RuntimeError, AssertionError, ArithmeticError, LookupError, TypeError)


def check_weights(part: Part[Any]) -> None:
    """Raises ValueError that names the missing, unexpected, mis-shaped and mistyped tensors of a part, if any."""
    source, found = part.path or part.name, part.state_dict
    if (blocks := _count_blocks(part.params)) > len(found):  # before a network of any size is built
        raise ValueError(f"the weights of {source} are damaged: {blocks} blocks cannot have {len(found)} tensors")
    try:
        expected = expected_tensors(component(part.name).network, part.params)
    except _IMPOSSIBLE as error:
        raise ValueError(f"the weights of {source} have impossible sizes for the {part.name} ({error})") from error
    shared = {key: entry for key, entry in expected.items() if key in found}
    problems = {
        "missing": [key for key in expected if key not in found],
        "unexpected": [key for key in found if key not in expected],
        "wrong shape": [
            f"{key} is {list(found[key].shape)}, expected {list(shape)}"
            for key, (shape, _) in shared.items()
            if tuple(found[key].shape) != tuple(shape)
        ],
        "wrong dtype": [
            f"{key} is {str(found[key].dtype).removeprefix('torch.')}, expected floating-point numbers"
            for key, (_, is_float) in shared.items()
            if is_float and not found[key].dtype.is_floating_point
        ],
    }
    text = ", ".join(f"{what}: {len(keys)} ({listed(keys, width=100)})" for what, keys in problems.items() if keys)
    if text:
        raise ValueError(f"the weights of {source} do not fit the {part.name} of these params; {text}")


def _count_blocks(params: Any) -> int:
    """Returns the number of blocks that params state, or a part of it."""
    counts = [getattr(params, name, 0) for name in ("depth", "layers", "levels", "bottleneck_blocks")]
    repeats = (*getattr(params, "blocks", ()), *getattr(params, "repeats", ()))
    return sum(counts) + sum(repeats) + sum(stage[-1] for stage in getattr(params, "stages", ()))


@lru_cache(maxsize=64)
def expected_tensors(network: Any, params: Any) -> Expected:
    """Returns the tensors of a network with these params, without allocating them."""
    with torch.device("meta"):
        state = network(params).state_dict()
    return {key: (x.shape, x.dtype.is_floating_point) for key, x in state.items()}
