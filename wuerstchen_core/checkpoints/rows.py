"""Tables of embeddings of which a bundle stores only the rows that were ever trained.

Beside such an `X.weight` [n, c] stands `X.rows` [n], the places of its rows in the whole table; the others are zeros.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .components import Part, State

TABLE = "token_embedding"  # of a text tower: a few hundred of its 49408 rows are what a small model has learned


def thinned(tower: Part, rows: Iterable[int]) -> Part:
    """A text tower of which only these rows are stored."""
    kept = torch.tensor(sorted(set(rows)), dtype=torch.int32)
    table = tower.state_dict[f"{TABLE}.weight"][kept.long()]
    return replace(tower, state_dict={**tower.state_dict, f"{TABLE}.weight": table, f"{TABLE}.rows": kept})


def complete(state: State, sizes: Mapping[str, Any] | None) -> State:
    """A network's weights with the rows that were left out, as `sizes` in the bundle's metadata count them."""
    if f"{TABLE}.rows" not in state:
        return state
    total = (sizes or {}).get("vocab_size")
    if not isinstance(total, int):
        raise ValueError("the metadata of this bundle does not say how long its table of tokens is: fetch it again")
    state = dict(state)
    rows, stored = state.pop(f"{TABLE}.rows"), state[f"{TABLE}.weight"]
    state[f"{TABLE}.weight"] = _whole(stored, rows, total)
    return state


def _whole(stored: Tensor, rows: Tensor, total: int) -> Tensor:
    table = torch.zeros(total, stored.shape[1], device=stored.device).to(stored.dtype)
    if stored.is_meta:
        return table
    if len(rows) != len(stored) or not 0 <= int(rows.min()) <= int(rows.max()) < total:
        raise ValueError("the table of tokens of this bundle is damaged: fetch it again")
    table.view(torch.uint8)[rows.long()] = stored.view(torch.uint8)  # since torch can't put fp8
    return table
