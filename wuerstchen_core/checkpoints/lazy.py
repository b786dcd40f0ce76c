"""Tensors that are computed when they are written, so that converting needs memory for one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class LazyTensor:
    """Shape and dtype of a tensor, and the function that computes it. `load()` computes it anew each time.

    `is_meta` is True if there is no data. `stored` is the dtype in the source file, before any conversion.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]
    is_meta: bool = False
    stored: torch.dtype | None = None

    @classmethod
    def of(cls, x: Tensor | LazyTensor) -> LazyTensor:
        """Returns a tensor as a LazyTensor; a LazyTensor is returned unchanged."""
        return x if isinstance(x, LazyTensor) else cls(tuple(x.shape), x.dtype, lambda: x, x.is_meta, x.dtype)

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


AnyTensor = TypeVar("AnyTensor", Tensor, LazyTensor)


def lazy_state(state: Mapping[str, Tensor | LazyTensor]) -> dict[str, LazyTensor]:
    """Returns a state dict with each tensor as a LazyTensor."""
    return {key: LazyTensor.of(x) for key, x in state.items()}


def apply(function: Callable[..., Tensor], *inputs: Any, shape: Sequence[int], dtype: torch.dtype) -> Any:
    """Returns `function(*inputs)`; with lazy inputs a LazyTensor of the given shape and dtype that calls it later.

    The caller gives the shape and dtype because letting torch infer them would import another 70 MB.
    """
    if not isinstance(inputs[0], LazyTensor):
        return function(*inputs)
    is_meta, stored = any(x.is_meta for x in inputs), inputs[0].stored
    return LazyTensor(tuple(shape), dtype, lambda: function(*(x.load() for x in inputs)), is_meta, stored)
