"""Models in int8: ComfyUI's patches, hooks, merges and files, and oneDNN's kernels on a CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tools.comfyui.client import Inside, Install, run_inside
from wuerstchen_core.checkpoints.convert import convert
from wuerstchen_core.common.devices import has_int8
from wuerstchen_core.common.int8 import quantize_rows

MOST = 0.03  # of what the exact model computes


@pytest.fixture(scope="module")
def inside(install: Install, tmp_path_factory: pytest.TempPathFactory) -> Inside:
    folder = tmp_path_factory.mktemp("int8")
    convert(["demo"], folder, dtype="int8")
    return run_inside(install, "inside_int8.py", folder, folder)


@pytest.fixture(scope="module")
def tensors(inside: Inside) -> dict[str, Tensor]:
    if "refused" in inside[1]:
        pytest.skip("this ComfyUI has no layers in int8")
    return inside[0]


def error(x: Tensor, exact: Tensor) -> float:
    return float((x - exact).norm() / exact.norm())


def test_the_dtype_is_offered_and_an_old_comfyui_refuses_it(inside: Inside, install: Install) -> None:
    facts = inside[1]
    assert "int8" in facts["choices"]
    old = not (install.root / "comfy" / "quant_ops.py").exists()
    assert old == ("refused" in facts) and (not old or "update ComfyUI" in facts["refused"])


def test_a_file_in_int8_is_computed_everywhere(inside: Inside) -> None:
    assert 0 < error(inside[0]["of the file"], inside[0]["exact"]) < MOST


def test_linear_layers_are_in_int8_and_take_a_quarter(inside: Inside, tensors: dict[str, Tensor]) -> None:
    facts = inside[1]
    assert 40 < len(facts["int8"]) < 60 and not [name for name in facts["int8"] if "mapper_" in name]
    assert facts["int8 of the file"] == (facts["int8"] if has_int8() else [])
    others = [name for name in facts["int8 of the file"] if name != "blocks.0.channelwise.0"]
    assert facts["int8 of a part"] == others  # what a file has in more bits stays so
    kept, message = facts["apple"]
    assert not kept and "Apple" in message  # torch has no product in int8 for them
    small, exact = facts["sizes"]
    assert small < 0.45 * exact  # the shipped model has large convolutions
    assert 0 < error(tensors["before"], tensors["exact"]) < MOST
    assert 0 < error(tensors["decoder"], tensors["exact decoder"]) < MOST


def test_patches_are_quantised_once_and_leave_nothing(inside: Inside, tensors: dict[str, Tensor]) -> None:
    names = inside[1]["int8"]
    assert inside[1]["packed"] == ([len(names), 0, 2] if inside[1]["fast"] else [0, 0, 0])
    assert (
        error(tensors["with lora"], tensors["exact with lora"])
        < MOST
        < error(tensors["exact with lora"], tensors["exact"])
    )
    assert torch.equal(tensors["after lora"], tensors["before"])


def test_a_patched_weight_equals_patching_before_quantising(tensors: dict[str, Tensor]) -> None:
    up, down = (tensors[f"lora/diffusion_model.blocks.2.attention.to_q.lora_{name}.weight"] for name in ("up", "down"))
    numbers, scale = quantize_rows(tensors["weight"] + up @ down)
    steps = (tensors["weight with lora"] / scale - numbers).abs()
    assert steps.max() < 1.01 and (steps > 0.01).float().mean() < 1e-3  # ComfyUI adds in another order


@pytest.mark.parametrize("mode", ["MaxSpeed", "MinVram", "MaxSpeed, on demand", "MinVram, on demand"])
def test_hooks_switch_weights_and_their_scales(tensors: dict[str, Tensor], mode: str) -> None:
    for i in range(4):
        assert torch.equal(tensors[f"{mode}/{i}"], tensors["before" if i % 2 else "with lora"])
    assert torch.equal(tensors["after hooks"], tensors["before"])


def test_merges_saved_files_and_samples_are_the_exact_models(inside: Inside, tensors: dict[str, Tensor]) -> None:
    assert error(tensors["merged"], tensors["exact merged"]) < MOST
    assert inside[1]["int8 again"] == inside[1]["int8 of the file"]
    assert error(tensors["saved"], tensors["with lora"]) < (1e-6 if has_int8() else MOST)
    assert error(tensors["saved in fp32"], tensors["exact with lora"]) < MOST
    assert error(tensors["sampled"], tensors["exact sampled"]) < 4 * MOST  # of guidance 4
