"""The keys of training configurations: a list for people, and a JSON schema for editors."""

from __future__ import annotations

import dataclasses
from typing import Any

from ..common.dataclass_config import MEANING
from ..common.json_schema import option_schema, table_schema
from ..common.toml import toml_key, toml_value
from .config import INPUTS
from .data.demo import DemoDataConfig
from .data.filters import ImageDataConfig
from .data.sources import SourceConfig
from .tables import tables_of

COMMENT_COLUMN = 40
SCHEMA = "http://json-schema.org/draft-07/schema#"  # the version that editors' TOML extensions read


def list_keys(stage: str) -> str:
    """Returns a TOML file with all keys of a stage, their defaults and meanings; required ones are comments."""
    tables = tables_of(stage)
    top = {key: x for key, x in tables.items() if isinstance(x, dataclasses.Field)}
    parts = ["\n".join(_line(key, field) for key, field in top.items())]
    parts += ["[inputs]\n" + "\n".join(_note(f"# {key} =", text) for key, text in _inputs().items())]
    for name, kind in tables.items():
        if name not in top:
            parts.append(f"[{name}]\n{_table(kind)}")
        if name == "data":
            parts.append(_comment("[[data.sources]], with keys that [data] has for all sources", SourceConfig))
            parts.append(_comment("[data] without a source: the demo's drawings", DemoDataConfig))
    return "\n\n".join(parts) + "\n"


def schema_of(stage: str) -> dict[str, Any]:
    """Returns the JSON schema of a stage's configuration."""
    properties: dict[str, Any] = {
        name: option_schema(kind, str)
        if isinstance(kind, dataclasses.Field)
        else table_schema(kind, all_required=name != "model")  # with `start`, sizes may be missing
        for name, kind in tables_of(stage).items()
    }
    named = {"anyOf": [{"required": ["source"]}, {"required": ["sources"]}]}
    properties["data"] = {"anyOf": [table_schema(ImageDataConfig) | named, table_schema(DemoDataConfig)]}
    inputs = {name: {"type": "string", "description": text} for name, text in _inputs().items()}
    properties["inputs"] = {"type": "object", "additionalProperties": False, "properties": inputs}
    schema = {"$schema": SCHEMA, "title": f"Würstchen: training of {stage}", "type": "object"}
    return schema | {"additionalProperties": False, "required": ["run", "train"], "properties": properties}


def _inputs() -> dict[str, str]:
    return {name: f'file, folder or "demo" with the {part.replace("_", " ")}' for name, part in INPUTS.items()}


def _table(kind: Any) -> str:
    return "\n".join(_line(field.name, field) for field in dataclasses.fields(kind))


def _comment(title: str, kind: Any) -> str:
    lines = (f"# {line.removeprefix('# ')}" for line in _table(kind).splitlines())
    return "\n".join([f"# {title}", *lines])


def _line(name: str, field: dataclasses.Field[Any]) -> str:
    meaning = field.metadata[MEANING]
    if field.default is dataclasses.MISSING:
        return _note(f"# {name} =", f"{meaning}; required")
    if field.default is None:
        return _note(f"# {name} =", meaning)
    return _note(f"{toml_key(name)} = {toml_value(field.default)}", meaning)


def _note(text: str, meaning: str) -> str:
    return f"{text:{COMMENT_COLUMN}} # {meaning}"
