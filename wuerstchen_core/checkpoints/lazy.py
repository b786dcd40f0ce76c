"""Tensors that are made when their turn comes: what is written needs one at a time, not all at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias, TypeVar, overload

import torch
from torch import Tensor


@dataclass(frozen=True)
class Planned:
    """A tensor's shape and dtype, and how to make it, which is done anew each time; `is_meta` if it has no data.

    `stored` is the dtype of what it is made of, before anything was widened.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]
    is_meta: bool = False
    stored: torch.dtype | None = None

    @property
    def size(self) -> int:
        """In bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


AnyTensor = TypeVar("AnyTensor", Tensor, Planned)


def as_it_is(x: Tensor) -> Planned:
    """A tensor that is there."""
    return Planned(tuple(x.shape), x.dtype, lambda: x, x.is_meta, x.dtype)


def all_as_they_are(state: Mapping[str, Tensor]) -> dict[str, Planned]:
    """Tensors that are there, by key."""
    return {key: as_it_is(x) for key, x in state.items()}


Make: TypeAlias = Callable[..., Tensor]


@overload
def derived(shape: Sequence[int], dtype: torch.dtype, make: Make, *given: Tensor) -> Tensor: ...
@overload
def derived(shape: Sequence[int], dtype: torch.dtype, make: Make, *given: Planned) -> Planned: ...
def derived(shape: Sequence[int], dtype: torch.dtype, make: Make, *given: Tensor | Planned) -> Tensor | Planned:
    """What `make` makes of the given tensors: now, or where they are planned as a plan, for which the shape and dtype
    are told (torch could find them without data, but imports 70 MB for it).
    """
    plans = [x for x in given if isinstance(x, Planned)]
    if not plans:
        return make(*given)
    is_meta, stored = any(x.is_meta for x in plans), plans[0].stored
    return Planned(tuple(shape), dtype, lambda: make(*(x.make() for x in plans)), is_meta, stored)
