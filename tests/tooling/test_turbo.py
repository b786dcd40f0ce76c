"""The LoRA with which the shipped model needs few steps: its recipe, its file, and what is measured."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from wuerstchen_core import WuerstchenPipeline
from wuerstchen_core.checkpoints.weight_files import read_file_metadata
from wuerstchen_core.common.dataclass_config import from_table
from wuerstchen_core.training.config import LoopConfig, check_tables, read_config
from wuerstchen_core.training.tables import STAGES

pytest.importorskip("resvg_py", reason="drawing needs resvg-py")
pytest.importorskip("peft", reason="LoRAs are trained with peft")
pytest.importorskip("tqdm", reason="measuring needs tqdm")

from tools.demo import turbo  # noqa: E402
from tools.demo.evaluate import held_out_scenes  # noqa: E402


def test_the_recipe_takes_two_steps() -> None:
    config, tables = read_config(turbo.CONFIG, []), STAGES["distill-lora"].tables
    check_tables(config, tables)
    for name in tables:
        from_table(tables[name], config.get(name, {}), name)
    assert from_table(tables["distill"], config["distill"], "distill").steps == 2
    loop = from_table(LoopConfig, config["train"], "train")
    assert loop.save_every % loop.log_every == 0 and loop.steps % loop.save_every == 0


def test_the_lora_is_written_in_fp16_with_the_steps_of_both_stages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, target = tmp_path / "trained.safetensors", tmp_path / "a.safetensors"
    save_file({"a": torch.rand(3)}, file, {"sampling": '{"prior_steps": 2}'})
    monkeypatch.setattr(turbo, "run", lambda stage, recipe, changes: file)
    turbo.remake(tmp_path, target)
    assert torch.equal(load_file(target)["a"], load_file(file)["a"].half())
    assert read_file_metadata(target) == {"sampling": '{"prior_steps": 2, "decoder_steps": 1}'}


@pytest.mark.long
def test_the_spread_is_that_of_the_seeds_only(monkeypatch: pytest.MonkeyPatch) -> None:
    features = torch.tensor([[0.0, 1.0], [2.0, 1.0]])
    assert turbo.spread(features) == 1.0 and turbo.spread(features + torch.tensor([5.0, 3.0])) == 1.0
    pipe = WuerstchenPipeline.load("demo", device="cpu", dtype="fp32", progress=False)
    pipe.sampling = pipe.sampling.updated(width=64, height=64, prior_steps=1, prior_guidance=1.0, decoder_steps=1)
    scenes = held_out_scenes(pipe.metadata)[:1]
    monkeypatch.setattr(turbo, "SEEDS", 2)
    assert turbo.spread_of_images(pipe, scenes) > 0
    monkeypatch.setattr(turbo, "SEEDS", 1)
    assert turbo.spread_of_images(pipe, scenes) == 0
