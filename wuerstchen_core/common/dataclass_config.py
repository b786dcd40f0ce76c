"""Dataclasses out of tables that people write: TOML configurations, the JSON of a file's metadata."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")


def from_table(kind: type[T], table: Mapping[str, Any], where: str) -> T:
    """A dataclass from its values by name (lists become tuples).

    ValueError names unknown, missing and mistyped keys; `where` is the name of the table they stand in.
    """
    if not isinstance(table, Mapping):
        raise ValueError(f"{where} is a table of keys, not {table!r}")
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(set(table) - set(fields))
    if unknown:
        raise ValueError(f"[{where}] has no key {', '.join(unknown)}: it takes {', '.join(fields)}")
    missing = [
        name
        for name, field in fields.items()
        if name not in table and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"[{where}] lacks {', '.join(missing)}")
    hints = get_type_hints(kind)
    values = {key: _as_tuple(value) for key, value in table.items()}
    for key, value in values.items():
        if not _fits(value, hints[key]):
            raise ValueError(f"[{where}] {key} must be {_name(hints[key])}, got {value!r}")
    return kind(**values)


def check_range(config: object, where: str, names: str, least: float, most: float = math.inf) -> None:
    """Raises ValueError unless each of the fields in `names` is None or from `least` to `most`."""
    expected = f"at least {least:g}" if most == math.inf else f"from {least:g} to {most:g}"
    for name in names.split():
        value = getattr(config, name)
        if value is not None and not least <= value <= most:
            raise ValueError(f"[{where}] {name} must be {expected}, got {value:g}")


def check_choices(config: object, where: str, name: str, known: Iterable[str]) -> None:
    """Raises ValueError unless a field is one of `known`, or for a tuple, one or more of them without repetition."""
    value = getattr(config, name)
    values = value if isinstance(value, tuple) else (value,)
    if not values or not set(values) <= set(known) or len(set(values)) < len(values):
        amount = "one or more" if value is values else "one"
        raise ValueError(f"[{where}] {name} must be {amount} of {', '.join(known)}, got {', '.join(values) or 'none'}")


_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
_MANY = {int: "whole numbers", float: "numbers", bool: "true and false", str: "texts"}


def _name(hint: Any) -> str:
    if hint in _NAMES:
        return _NAMES[hint]
    kinds = get_args(hint)
    if isinstance(hint, UnionType):
        return " or ".join(_name(kind) for kind in kinds if kind is not NoneType)
    return f"a list of {'' if kinds[-1] is Ellipsis else f'{len(kinds)} '}{_MANY.get(kinds[0], 'lists')}"


def _fits(value: Any, hint: Any) -> bool:
    if isinstance(hint, UnionType):
        return any(_fits(value, kind) for kind in get_args(hint))
    expected = get_origin(hint) or hint
    if expected is tuple:
        kinds = get_args(hint)
        kinds = kinds[:1] * len(value) if isinstance(value, tuple) and kinds[-1] is Ellipsis else kinds
        return isinstance(value, tuple) and len(value) == len(kinds) and all(map(_fits, value, kinds))
    if isinstance(value, bool):  # which Python takes for a number
        return expected is bool
    return isinstance(value, (int, float) if expected is float else expected)


def _as_tuple(value: Any) -> Any:
    """Lists to tuples, at every depth."""
    return tuple(_as_tuple(item) for item in value) if isinstance(value, list) else value
