"""Tensors that are computed when they are written, so that converting needs memory for one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class LazyTensor:
    """Shape and dtype of a tensor, and the function that reads or computes it, which `load()` calls each time.

    `stored` is the dtype in the source file, before any conversion, and `quantised` what the file stores of a weight in
    8 bits.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]
    stored: torch.dtype | None = None
    quantised: Quantised | None = None

    @classmethod
    def of(cls, x: Tensor | LazyTensor) -> LazyTensor:
        """Returns a tensor as a LazyTensor; a LazyTensor is returned unchanged."""
        return x if isinstance(x, LazyTensor) else cls(tuple(x.shape), x.dtype, lambda: x, x.dtype)

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Quantised:
    """A weight in 8 bits, the scale or scales by which it is multiplied, and ComfyUI's JSON about its format."""

    numbers: LazyTensor
    scale: LazyTensor
    config: dict[str, Any]


AnyTensor = TypeVar("AnyTensor", Tensor, LazyTensor)


def lazy_state(state: Mapping[str, Tensor | LazyTensor]) -> dict[str, LazyTensor]:
    """Returns a state dict with each tensor as a LazyTensor."""
    return {key: LazyTensor.of(x) for key, x in state.items()}


def load_state(state: Mapping[str, Tensor | LazyTensor]) -> dict[str, Tensor]:
    """Returns a state dict with each LazyTensor loaded."""
    return {key: LazyTensor.of(x).load() for key, x in state.items()}


def apply(function: Callable[..., Tensor], *inputs: Any, shape: Sequence[int], dtype: torch.dtype) -> Any:
    """Returns `function(*inputs)`; with lazy inputs a LazyTensor of the given shape and dtype that calls it later.

    The caller gives the shape and dtype because letting torch infer them would import another 70 MB.
    """
    if not isinstance(inputs[0], LazyTensor):
        return function(*inputs)

    def compute() -> Tensor:
        out = function(*(x.load() for x in inputs))
        is_part = out.untyped_storage().nbytes() > out.nbytes  # which would keep the whole input in memory
        return out.clone() if is_part else out

    return LazyTensor(tuple(shape), dtype, compute, inputs[0].stored)


def apply_to_rows(function: Callable[..., Tensor], *inputs: Any, rows: int) -> Any:
    """Returns `apply` of a function that returns `rows` whole rows of its inputs; quantised inputs stay quantised."""
    first = inputs[0]
    out = apply(function, *inputs, shape=(rows, *first.shape[1:]), dtype=first.dtype)
    weights = [x.quantised for x in inputs if isinstance(x, LazyTensor) and x.quantised is not None]
    if len(weights) < len(inputs) or any(one.config != weights[0].config for one in weights):
        return out
    numbers = apply_to_rows(function, *(one.numbers for one in weights), rows=rows)
    scale = weights[0].scale
    if len(weights) > 1 or torch.Size(scale.shape).numel() > 1:
        scales = [_scale_of_rows(one) for one in weights]
        scale = apply(function, *scales, shape=(rows, 1), dtype=torch.float32)
    return replace(out, quantised=Quantised(numbers, scale, weights[0].config))


def _scale_of_rows(weight: Quantised) -> LazyTensor:
    """Returns the scale of each row, [rows, 1]."""
    rows = weight.numbers.shape[0]
    return LazyTensor((rows, 1), torch.float32, lambda: weight.scale.load().float().reshape(-1, 1).expand(rows, 1))
