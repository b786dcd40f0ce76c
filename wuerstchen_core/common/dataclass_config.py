"""Builds dataclasses from tables: TOML configurations, and the JSON metadata of weight files."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from .text import nearest

T = TypeVar("T")
MEANING = "meaning"  # of a field's metadata

_TYPES = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}
_ITEMS = {int: "whole numbers", float: "numbers", bool: "booleans", str: "strings"}


@dataclass(frozen=True)
class Range:
    """Limits of a finite number, as in `Annotated[float, Range(least=0, most=1)]`; `from_table` checks them."""

    least: float = -math.inf
    above: float = -math.inf
    most: float = math.inf
    below: float = math.inf

    def __contains__(self, x: float) -> bool:
        return self.least <= x <= self.most and self.above < x < self.below

    def __str__(self) -> str:
        words = {"at least": self.least, "more than": self.above, "at most": self.most, "less than": self.below}
        return " and ".join(f"{word} {limit}" for word, limit in words.items() if math.isfinite(limit))


@dataclass(frozen=True)
class OneOf:
    """Choices for a string, or for a list of different strings, as in `Annotated[str, OneOf(("p2", "v"))]`."""

    names: Collection[str]

    def __contains__(self, x: str | tuple[str, ...]) -> bool:
        chosen = x if isinstance(x, tuple) else (x,)
        return bool(chosen) and set(chosen) <= set(self.names) and len(set(chosen)) == len(chosen)

    def __str__(self) -> str:
        return f"of {', '.join(filter(None, self.names))}"


Fraction = Annotated[float, Range(least=0, most=1)]
Positive = Annotated[float, Range(above=0)]
NotNegative = Annotated[float, Range(least=0)]
Count = Annotated[int, Range(least=1)]
CountOrZero = Annotated[int, Range(least=0)]


def option(default: Any = dataclasses.MISSING, meaning: str = "") -> Any:
    """Returns a dataclass field with a one-line description, without a default if it is required."""
    return dataclasses.field(default=default, metadata={MEANING: meaning})


def from_table(kind: type[T], table: Mapping[str, Any], where: str) -> T:
    """Returns a dataclass with the values of a table; lists become tuples, and their tables other dataclasses.

    ValueError names the table (`where`) and its unknown, missing and invalid keys.
    """
    if not isinstance(table, Mapping):
        raise ValueError(f"{where} must be a table of keys, got {table!r}")
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if unknown := sorted(set(table) - set(fields)):
        like = {name: nearest(name, fields) for name in unknown}
        known = "" if all(like.values()) else f": it takes {', '.join(fields)}"
        raise ValueError(f"[{where}] has no key {', '.join(f'{name}{x}' for name, x in like.items())}{known}")
    missing = [
        name
        for name, field in fields.items()
        if name not in table and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"[{where}] lacks {', '.join(missing)}")
    hints = get_type_hints(kind, include_extras=True)
    values = {key: _as_tuple(value) for key, value in table.items()}
    for key, value in values.items():
        if item := item_dataclass(hints[key]):
            rows = value if isinstance(value, tuple) else (value,)
            values[key] = tuple(from_table(item, row, f"{where}.{key}") for row in rows)
        elif not _fits(value, hints[key]):
            raise ValueError(f"[{where}] {key} must be {_describe(hints[key], _TYPES)}, got {table[key]!r}")
    return kind(**values)


def item_dataclass(hint: Any) -> Any:
    """Returns the dataclass of `tuple[dataclass, ...]`, the type of an array of tables; None for other types."""
    item = get_args(hint)[0] if get_origin(hint) is tuple else None
    return item if dataclasses.is_dataclass(item) else None


def _fits(value: Any, hint: Any) -> bool:
    origin, arguments = get_origin(hint) or hint, get_args(hint)
    if origin is Annotated:
        return _fits(value, arguments[0]) and value in arguments[1]
    if origin in (Union, UnionType):
        return any(_fits(value, kind) for kind in arguments)
    if origin is tuple:
        kinds = arguments[:1] * len(value) if isinstance(value, tuple) and arguments[-1] is Ellipsis else arguments
        return isinstance(value, tuple) and len(value) == len(kinds) and all(map(_fits, value, kinds))
    if origin is dict:
        return isinstance(value, Mapping) and all(_fits(item, arguments[1]) for item in value.values())
    if hint is Any:
        return True
    if isinstance(value, bool):  # a bool is an int in Python
        return origin is bool
    return isinstance(value, (int, float) if origin is float else origin)


def _describe(hint: Any, names: Mapping[type, str]) -> str:
    """Describes the values of a type in words; `names` are the words for the simple types."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        if isinstance(arguments[1], OneOf):
            return f"one {'or more ' if arguments[0] is not str else ''}{arguments[1]}"
        return f"{_describe(arguments[0], names)}, {arguments[1]}"
    if origin in (Union, UnionType):
        return " or ".join(_describe(kind, names) for kind in arguments if kind is not NoneType)
    if origin is tuple:
        count = "" if arguments[-1] is Ellipsis else f"{len(arguments)} "
        return f"{'lists' if names is _ITEMS else 'a list'} of {count}{_describe(arguments[0], _ITEMS)}"
    if origin is dict:
        return "a table of keys" if arguments[1] is Any else f"a table of {_describe(arguments[1], _ITEMS)}"
    return names[hint]


def _as_tuple(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _as_tuple(item) for key, item in value.items()}
    return tuple(_as_tuple(item) for item in value) if isinstance(value, list) else value
