"""Stage C trained together with ControlNets, in a tiny size."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.lora_training import write_config
from helpers.tiny_model import write_tiny_bundle
from helpers.tiny_stages import assert_equal_states

from tools.demo.joint import RECIPES, JointStage
from wuerstchen_core.checkpoints import load_control_net, load_prior, read_metadata
from wuerstchen_core.checkpoints.release import check_control
from wuerstchen_core.training.config import read_config
from wuerstchen_core.training.rng import StepRandom
from wuerstchen_core.training.run import run

pytest.importorskip("resvg_py", reason="drawing needs resvg-py")

CONFIG = """
run = "overridden"
[data]
canvas = 64
things = 3
layouts = ["large", "pair"]
scattered = 6
scattered_share = 0.5
[noise]
weight = "v"
stratified = true
[train]
steps = 4
batch = 4
lr = 1e-2
warmup = 1
ema = 0.5
log_every = 2
save_every = 2
sheet_every = 1000
"""
STEPS = range(32)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("joint")
    return write_config(folder, write_tiny_bundle(folder / "tiny.safetensors"), CONFIG)


@pytest.fixture(scope="module")
def trained(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    overrides = [f"run='{tmp_path_factory.mktemp('run')}'", f"start='{config.parent / 'tiny.safetensors'}'"]
    return run("prior", config, overrides, JointStage).parent


def test_scattered_batches_have_the_hints_of_one_control_net(config: Path) -> None:
    stage = JointStage(read_config(config, [f"start='{config.parent / 'tiny.safetensors'}'"]))
    batches = [stage.batch(step, StepRandom(0, step, 4)) for step in STEPS]
    assert {kind for *_, kind in batches} == {"", *RECIPES}
    black: list[bool] = []
    for *batch, hint, kind in batches:
        assert (hint is None) == (kind == "")
        black.append(hint is not None and not hint.any())
        stage.net.zero_grad()
        stage.loss(stage.net, *batch, hint, kind).backward()
        learned = {
            name.split(".")[1] for name, p in stage.net.named_parameters() if p.grad is not None and "nets" in name
        }
        assert learned == {kind} - {""}
        assert all(p.grad is not None for name, p in stage.net.prior.named_parameters() if "blocks" in name)
    assert 0 < sum(black) < 8


def test_it_writes_a_prior_and_control_nets_that_fit_it(trained: Path) -> None:
    prior = load_prior(trained / "prior.safetensors")
    for kind in RECIPES:
        file = trained / f"{kind}.safetensors"
        net = load_control_net(file)
        check_control(net.params, prior.params, str(file))
        assert net.params.hints == kind and read_metadata(file)["training"]["step"] == 4
        assert "sampling" not in read_metadata(file)


def test_control_nets_can_be_trained_further(config: Path, trained: Path, tmp_path: Path) -> None:
    files = {kind: str(trained / f"{kind}.safetensors") for kind in RECIPES}
    stage = JointStage(read_config(config, [f"start='{trained / 'prior.safetensors'}'"]), files)
    for kind, file in files.items():
        assert_equal_states(stage.net.control_nets[kind].state_dict(), load_control_net(file).state_dict())
    assert_equal_states(stage.net.prior.state_dict(), load_prior(trained / "prior.safetensors").state_dict())
