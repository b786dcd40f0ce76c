"""The list of a configuration's keys, its JSON schema, and names that are nearly right."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from datetime import date, datetime, time, timezone
from pathlib import Path
from typing import Any

import pytest
from helpers.recipes import SHIPPED, command_of

from wuerstchen_core.cli.main import main
from wuerstchen_core.common.dataclass_config import MEANING, from_table
from wuerstchen_core.common.toml import write_toml
from wuerstchen_core.models.image_encoder import EFFICIENTNET_V2_S
from wuerstchen_core.training import config as config_module
from wuerstchen_core.training import keys
from wuerstchen_core.training.config import LoopConfig, check_tables
from wuerstchen_core.training.data.demo import DemoDataConfig
from wuerstchen_core.training.tables import COMMON, STAGES, tables_of

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["train", *arguments]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("stage", STAGES)
def test_the_list_has_each_key_with_its_default(stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, stage, "--keys")
    parsed = tomllib.loads(text)
    check_tables({"run": "x", "model": {}, **parsed} if "model" in STAGES[stage].tables else {"run": "x", **parsed},
                 STAGES[stage].tables)  # fmt: skip
    for name, kind in tables_of(stage).items():
        if isinstance(kind, dataclasses.Field):
            continue
        fields = dataclasses.fields(kind)
        optional = {field.name: field.default for field in fields if field.default not in (dataclasses.MISSING, None)}
        assert json.dumps(parsed.get(name, {})) == json.dumps(optional)
        assert all(f"{field.name} =" in text for field in fields)
    assert all(f"# {field.name} =" in text for field in dataclasses.fields(DemoDataConfig))


def test_every_key_has_a_meaning() -> None:
    kinds = {kind for stage in STAGES for kind in tables_of(stage).values()} | {DemoDataConfig}
    fields = [
        f for kind in kinds for f in ([kind] if isinstance(kind, dataclasses.Field) else dataclasses.fields(kind))
    ]
    assert [field.name for field in fields if not field.metadata.get(MEANING)] == []
    assert {"inputs", *COMMON} == set(config_module.COMMON)


def errors(schema: dict[str, Any], value: Any) -> Iterator[str]:
    jsonschema = pytest.importorskip("jsonschema")
    for error in jsonschema.Draft7Validator(schema).iter_errors(value):
        yield error.json_path


def test_the_schema_knows_the_tables_of_sources() -> None:
    config: dict[str, Any] = {"run": "x", "train": {"steps": 1, "batch": 1, "lr": 1.0}}
    row = {"source": "a", "repeats": 2, "regularisation": False, "caption_column": "text"}
    schema = keys.schema_of("prior")
    assert list(errors(schema, {**config, "data": {"sources": [{"source": ["a", "b"]}, row]}})) == []
    for wrong in ({**row, "repeats": 0}, {"repeats": 2}, {**row, "repeat": 2}):
        assert list(errors(schema, {**config, "data": {"sources": [wrong]}}))
    assert list(errors(schema, {**config, "data": {"size": 64}}))
    assert all(f"# {name} =" in keys.list_keys("prior") for name in ("repeats", "weight", "regularisation", "split"))


@pytest.mark.parametrize("recipe", SHIPPED, ids=lambda path: path.stem)
def test_shipped_recipes_fit_the_schema(recipe: Path) -> None:
    config = tomllib.loads(recipe.read_text("utf-8"))
    assert list(errors(keys.schema_of(command_of(recipe)[1]), config)) == []


@pytest.mark.parametrize(
    ("table", "value"),
    [
        ("train", {"steps": 0}),
        ("train", {"betas": [0.9]}),
        ("train", {"betas": [0.9, 1.0]}),
        ("train", {"lr": "1e-3"}),
        ("train", {"precision": "fp8"}),
        ("train", {"stepz": 3}),
        ("noise", {"weight": "p3"}),
        ("inputs", {"effnet": "x"}),
        ("data", {"source": "x", "max_unsafe": 2.0}),
        ("data", {"layouts": ["large", "large"]}),
        ("vqgan", {"crop": 32}),
    ],
)
def test_the_schema_rejects_what_a_run_rejects(table: str, value: dict[str, Any]) -> None:
    config: dict[str, Any] = {"run": "x", "model": {}, "train": {"steps": 1, "batch": 1, "lr": 1.0}}
    assert list(errors(keys.schema_of("prior"), config)) == []
    assert list(errors(keys.schema_of("prior"), {**config, table: {**config.get(table, {}), **value}})) != []


def test_the_schema_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    schema = json.loads(printed(capsys, "lora", "--keys", "--json"))
    assert schema == json.loads(json.dumps(keys.schema_of("lora")))
    assert schema["properties"]["lora"]["properties"]["rank"] == {
        "description": dict((f.name, f.metadata[MEANING]) for f in dataclasses.fields(STAGES["lora"].tables["lora"]))[
            "rank"
        ],
        "type": "integer", "minimum": 1, "default": 4,
    }  # fmt: skip


def test_a_cache_has_no_keys_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "cache", "--keys"]) == 2
    assert "cache" in capsys.readouterr().err


@pytest.mark.parametrize(("wrong", "right"), [("stepz", "steps"), ("batchsize", "batch"), ("save_evry", "save_every")])
def test_the_nearest_key_is_named(wrong: str, right: str) -> None:
    with pytest.raises(ValueError, match=rf"{wrong} \(did you mean {right}\?\)"):
        from_table(LoopConfig, {wrong: 1}, "train")


def test_the_nearest_table_is_named() -> None:
    with pytest.raises(ValueError, match=r"modle \(did you mean model\?\)"):
        check_tables({"run": "x", "modle": {}}, STAGES["prior"].tables)
    with pytest.raises(ValueError, match="xyz:"):
        check_tables({"run": "x", "xyz": {}}, STAGES["prior"].tables)


def test_toml_is_written_as_it_is_read() -> None:
    config = {
        "run": 'C:\\runs "1"\n\x7fü\U0001f600', "steps": 3, "rate": 1e-05, "on": True, "huge": float("inf"),
        "data": {"betas": [0.9, 1.0], "stages": [["fused", 1], []], "a key": "x", "point": {"x": 1}},
        "day": date(2026, 1, 2), "times": [datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone.utc), time(6, 7)],
        "token-decoder": {"path": ""},
    }  # fmt: skip
    assert tomllib.loads(write_toml(config)) == config
    assert tomllib.loads(write_toml({"a": None, "b": {"stages": EFFICIENTNET_V2_S, "c": None}})) == {
        "b": {"stages": [list(stage) for stage in EFFICIENTNET_V2_S]}
    }
