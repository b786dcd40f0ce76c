"""ControlNets in ComfyUI: equal to the core, with masks, areas and its memory management, and refused where they do
not fit."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bundles import TINY, Generate
from errors import check_error
from helpers.networks import CONTROL, NETWORKS
from images import LIMIT, deviation
from inside_control import MISTAKES, SIZE
from PIL import Image

from tools.comfyui.client import Inside, Install, Server, run_inside
from wuerstchen_core import Hint, WuerstchenPipeline
from wuerstchen_core.checkpoints import save_bundle
from wuerstchen_core.checkpoints.release import PRIOR_VALUES
from wuerstchen_core.models.control_net import ControlNet

pytestmark = pytest.mark.newest


@pytest.fixture(scope="module")
def nets(models: Path) -> Path:
    """ControlNets for the tiny prior, or not, and hints, in ComfyUI's folder of them."""
    folder = models / "controlnet"
    net = NETWORKS["control_net"].perturbed()
    with torch.no_grad():
        for projection in net.projections.values():
            projection.weight.mul_(10)
    for name, params, dtype in (
        ("net", CONTROL, None),
        ("half", CONTROL, torch.bfloat16),
        ("other", replace(CONTROL, prior_blocks=(1,)), None),
        ("deep", replace(CONTROL, prior_depth=3), None),
        ("retrained", replace(CONTROL, prior_values=(0.5,) * PRIOR_VALUES), None),
        ("nan", CONTROL, None),
    ):
        other = ControlNet(params)
        other.load_state_dict({key: x for key, x in net.state_dict().items() if key in other.state_dict()})
        if name == "nan":
            other.hint_stem.weight.data.fill_(float("nan"))
        save_bundle(folder / f"{name}.safetensors", {"control_net": other}, {}, dtype)
    for name, size, box in (
        ("first", SIZE, (20, 20, 90, 90)),
        ("second", SIZE, (110, 30, 180, 120)),
        ("wide", (300, 90), (100, 10, 200, 80)),
    ):
        image = Image.new("RGB", size)
        image.paste("white", box)
        image.save(folder / f"{name}.png")
    return folder


@pytest.fixture(scope="module")
def inside(install: Install, checkpoints: Path, nets: Path, tmp_path_factory: pytest.TempPathFactory) -> Inside:
    """The results of inside_control.py in this ComfyUI."""
    return run_inside(install, "inside_control.py", tmp_path_factory.mktemp("control"), checkpoints / TINY, nets)


@pytest.mark.parametrize(
    "run",
    ["plain", "strength", "start", "chained", "batch", "old node", "half", "negative", "cancelled"],
)
def test_the_same_hints_give_the_cores_latents(inside: Inside, run: str) -> None:
    got, want = inside[0][f"got/{run}"], inside[0][f"want/{run}"]
    assert (got - want).abs().max() / want.std() < 2e-4
    plain = inside[0]["want/plain"]
    assert run in ("plain", "negative", "batch") or (want - plain).abs().max() / plain.std() > 0.05


def test_a_hint_for_each_picture(inside: Inside) -> None:
    two, other, one = (inside[0][name] for name in ("two hints", "second hint", "want/batch"))
    torch.testing.assert_close(two[0], one[0], rtol=0, atol=2e-4 * float(one.std()))
    assert (two[1] - one[1]).abs().max() > 0.05 and (other - two).abs().amax((1, 2, 3)).min() > 0.05


@pytest.mark.parametrize("run", ["area", "mask"])
def test_masks_and_areas_limit_where_a_hint_acts(inside: Inside, run: str) -> None:
    """The prior's attention carries a little of the change to the rest."""
    change = (inside[0][run] - inside[0][f"{run} without"]).abs().mean((0, 1, 2))
    assert change[:2].mean() > 2 * change[3:].mean() > 0


def test_notices(inside: Inside) -> None:
    shape, inverted, union, times, prior = dict.fromkeys(inside[1]["notices"])  # positive and negative have the same
    assert "300x90" in shape and "net.safetensors" in shape and "white" in inverted
    assert "control_type" in union and "outline" in union
    assert "0.05 to 0.1" in times and torch.equal(inside[0]["no step"], inside[0]["got/plain"])
    assert "retrained.safetensors" in prior and "prior" in prior


def test_memory_management(inside: Inside) -> None:
    facts = inside[1]["memory"]
    assert facts["models"] == [False, False, True, True] and facts["loaded"] and facts["freed"] and facts["clone"]
    assert 1e4 < facts["of a large picture"] < facts["bytes"] < 1e7
    assert facts["offloaded"] > 10 and facts["partial"] == [[1, 64, 3, 5]] * 2


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_does_not_fit_is_explained_in_one_line(inside: Inside, mistake: str) -> None:
    check_error(inside[1]["mistakes"].get(mistake, ""), *MISTAKES[mistake])


@pytest.mark.long
def test_the_workflow_in_a_picture_of_python_gives_the_same(
    server: Server, generate: Generate, checkpoints: Path, nets: Path
) -> None:
    (server.folder / "input").mkdir(exist_ok=True)
    shutil.copy(nets / "first.png", server.folder / "input")
    pipe = WuerstchenPipeline.load(checkpoints / TINY, device="cpu", dtype="fp32")
    control = Hint(nets / "net.safetensors", nets / "first.png", 0.8, end=0.75)
    [expected] = pipe.generate("a red apple", seed=3, control=control)
    [plain] = pipe.generate("a red apple", seed=3)
    [picture] = generate(json.loads(expected.info["prompt"])).pictures
    assert deviation(picture, expected) <= LIMIT < deviation(plain, expected)
