"""JSON schemas of dataclasses, for editors that check and complete configurations."""

from __future__ import annotations

import dataclasses
import math
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from .dataclass_config import MEANING, OneOf

_TYPES = {int: "integer", float: "number", bool: "boolean", str: "string", NoneType: "null"}
_LIMITS = {"least": "minimum", "above": "exclusiveMinimum", "most": "maximum", "below": "exclusiveMaximum"}


def table_schema(kind: Any, all_required: bool = True) -> dict[str, Any]:
    """Returns the schema of a table that `from_table` reads as a dataclass.

    `all_required`: False if fields without defaults may be missing.
    """
    hints = get_type_hints(kind, include_extras=True)
    fields = dataclasses.fields(kind)
    schema = {"type": "object", "additionalProperties": False}
    schema |= {"properties": {field.name: option_schema(field, hints[field.name]) for field in fields}}
    required = [field.name for field in fields if field.default is dataclasses.MISSING]
    return schema | ({"required": required} if required and all_required else {})


def option_schema(field: dataclasses.Field[Any], hint: Any) -> dict[str, Any]:
    """Returns the schema of a field made by `option`."""
    default = {} if field.default in (dataclasses.MISSING, None) else {"default": field.default}
    return {"description": field.metadata.get(MEANING, ""), **_schema(hint), **default}


def _schema(hint: Any) -> dict[str, Any]:
    origin, arguments = get_origin(hint), get_args(hint)
    if dataclasses.is_dataclass(hint):
        return table_schema(hint)
    if origin is Annotated:
        schema, limits = _schema(arguments[0]), arguments[1]
        if isinstance(limits, OneOf):
            choices = {"enum": list(limits.names)}
            return schema | {"items": choices, "minItems": 1, "uniqueItems": True} if "items" in schema else choices
        return schema | {word: limit for name, word in _LIMITS.items() if math.isfinite(limit := getattr(limits, name))}
    if origin in (Union, UnionType):  # TOML has no null
        kinds = [_schema(kind) for kind in arguments if kind is not NoneType]
        return kinds[0] if len(kinds) == 1 else {"anyOf": kinds}
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return {"type": "array", "items": _schema(arguments[0])}
        items = [_schema(kind) for kind in arguments]
        return {"type": "array", "items": items, "minItems": len(items), "maxItems": len(items)}
    if origin is dict:
        return {"type": "object", "additionalProperties": {} if arguments[1] is Any else _schema(arguments[1])}
    return {"type": _TYPES[hint]}
