"""`inspect`, `convert` and the loaders agree about every layout, whole or damaged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.weight_layouts import LAYOUTS, State, model, safetensors, whole
from safetensors.torch import load_file, save_file

from wuerstchen_core import WuerstchenPipeline
from wuerstchen_core.checkpoints import build_part, describe, read_part, save_bundle
from wuerstchen_core.checkpoints.convert import convert
from wuerstchen_core.checkpoints.weight_files import read_file_metadata
from wuerstchen_core.cli.main import main
from wuerstchen_core.models.text_encoder import TextEncoder, TextEncoderParams


def drop(state: State, key: str) -> None:
    del state[key]


def add(state: State, key: str) -> None:
    state[f"{key}_more"] = torch.zeros(3)


def lengthen(state: State, key: str) -> None:
    x = state[key]
    state[key] = torch.zeros(len(x) + 1, *x.shape[1:]).to(x.dtype)


def round_down(state: State, key: str) -> None:
    state[key] = torch.ones(state[key].shape, dtype=torch.int32)


def flatten(state: State, key: str) -> None:
    state[key] = state[key].reshape(-1, 1, 1, 1, 1).contiguous()


def scalar(state: State, key: str) -> None:
    state[key] = state[key].reshape(-1)[0].clone()


def verdicts(source: Path, part: str, output: Path) -> dict[str, bool]:
    """Returns True for what accepts a source. Anything but ValueError fails the test."""

    def accepts(run: Callable[[], Any]) -> bool:
        try:
            return run() is not False
        except ValueError as error:
            assert "\n" not in str(error)
            return False

    return {
        "inspect": accepts(lambda: not describe(source).problems),
        "convert": accepts(lambda: convert([source], output)),
        "load": accepts(lambda: build_part(read_part(source, part))),
    }


@pytest.mark.parametrize("name", LAYOUTS)
def test_whole_files_are_accepted(tmp_path: Path, name: str) -> None:
    layout = LAYOUTS[name]
    source = layout.write(tmp_path, layout.state())
    assert verdicts(source, layout.part, tmp_path / "output.safetensors") == dict.fromkeys(
        ("inspect", "convert", "load"), True
    )
    assert len(describe(source).parts) == layout.parts


@pytest.mark.parametrize("damage", [drop, add, lengthen, round_down, flatten, scalar])
@pytest.mark.parametrize("name", LAYOUTS)
def test_damaged_files_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, damage: Callable[[State, str], None]
) -> None:
    layout = LAYOUTS[name]
    state = dict(layout.state())
    matrices = [key for key, x in state.items() if x.ndim > 1 and key.endswith("weight") and x.shape[0] > 3]
    key = matrices[-2] if damage in (drop, lengthen, scalar) else matrices[len(matrices) // 2]
    damage(state, key)
    source = layout.write(tmp_path, state)
    assert not any(verdicts(source, layout.part, tmp_path / "output.safetensors").values()), key
    assert not list(tmp_path.glob("*output*"))
    if damage is drop:
        assert main(["inspect", str(source)]) == 2
        out, err = capsys.readouterr()
        assert "complete\n" not in out and err.count("\n") == 1


def test_parts_that_do_not_fit_one_another_are_no_complete_model(tmp_path: Path) -> None:
    parts = model()
    wide = TextEncoder(TextEncoderParams(width=64, heads=1, layers=1))
    save_bundle(tmp_path / "b.safetensors", {**parts, "decoder_text_encoder": wide}, {})
    description = describe(tmp_path / "b.safetensors")
    assert description.missing == () and "decoder text encoder" in description.problems["model"]
    assert description.lines()[-1] != "  complete"


def test_the_other_parts_of_a_damaged_bundle_still_load(tmp_path: Path) -> None:
    layout = LAYOUTS["bundle"]
    state = dict(layout.state())
    drop(state, "out_block.0.bias")
    source = layout.write(tmp_path, state)
    description = describe(source)
    assert list(description.problems) == ["vqgan"] and "out_block.0.bias" in description.problems["vqgan"]
    assert [part.name for part in description.parts] == ["prior", "decoder", "image_encoder", "text_encoder"]
    build_part(read_part(source, "prior"))


@pytest.mark.parametrize(
    "damage",
    [
        {"sampling": {"width": 100, "height": 128}}, {"sampling": {"prior_steps": "many"}},
        {"vocabulary": {"words": 3}}, {"version": "v3"},
        {"parts": {"prior": {"depth": 10**12}}}, {"parts": {"prior": {"c": -1}}},
    ],
)  # fmt: skip
def test_damaged_metadata_are_refused_as_by_the_pipeline(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: dict[str, Any]
) -> None:
    file = tmp_path / "bundle.safetensors"
    save_bundle(file, model(), {})
    content = json.loads(read_file_metadata(file)["wuerstchen"])
    prior = damage.get("parts", {}).get("prior")
    changes = {"parts": {**content["parts"], "prior": {**content["parts"]["prior"], **prior}}} if prior else damage
    save_file(load_file(file), file, {"wuerstchen": json.dumps(content | changes)})
    with pytest.raises(ValueError, match="\\w"):
        WuerstchenPipeline.load(file, device="cpu")
    assert main(["inspect", str(file)]) == 2
    out, err = capsys.readouterr()
    assert "complete\n" not in out and err.count("\n") == 1


@pytest.mark.parametrize("key", ["blocks.{}.depthwise.weight", "down_blocks.{}.0.depthwise.weight"])
def test_large_numbers_in_keys_are_refused_at_once(tmp_path: Path, key: str) -> None:
    state = {**whole("prior" if key.startswith("blocks") else "decoder"), key.format(10**9): torch.zeros(1)}
    with pytest.raises(ValueError, match="999999|1000000000"):
        describe(safetensors(tmp_path, state))
