"""Writes TOML."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import date, time
from typing import Any


def toml_value(value: Any) -> str:
    """Returns a string, number, truth value, date, time, list or table as TOML, in one line."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{toml_key(key)} = {toml_value(x)}" for key, x in value.items()) + "}"
    if isinstance(value, Sequence):
        return f"[{', '.join(map(toml_value, value))}]"
    return value.isoformat() if isinstance(value, date | time) else repr(value)


def toml_key(name: str) -> str:
    """Returns a key, quoted if TOML requires it."""
    return name if name.isascii() and name.replace("-", "_").isidentifier() else toml_value(name)


def write_toml(config: Mapping[str, Any]) -> str:
    """Returns a file with the keys at the top, then the tables of a configuration; None is left out."""
    top = {key: x for key, x in config.items() if not isinstance(x, Mapping)}
    parts = [_lines(top)]
    for name, table in ((name, x) for name, x in config.items() if isinstance(x, Mapping)):
        arrays = {key: x for key, x in table.items() if _is_array_of_tables(x)}
        parts.append(f"[{toml_key(name)}]\n{_lines({key: x for key, x in table.items() if key not in arrays})}")
        parts += [f"[[{toml_key(name)}.{toml_key(key)}]]\n{_lines(row)}" for key, x in arrays.items() for row in x]
    return "\n".join(filter(None, parts))


def _is_array_of_tables(value: Any) -> bool:
    return isinstance(value, Sequence) and bool(value) and all(isinstance(item, Mapping) for item in value)


def _lines(table: Mapping[str, Any]) -> str:
    return "".join(f"{toml_key(key)} = {toml_value(x)}\n" for key, x in table.items() if x is not None)
