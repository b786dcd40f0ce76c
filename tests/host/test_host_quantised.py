"""Quantised files, ComfyUI's and ours, are loaded with the weights that ComfyUI's own layers restore."""

from __future__ import annotations

import pytest
import torch
from helpers.layouts import random_state
from helpers.networks import PRIOR
from inside_quantised import FORMATS, LAYERS, WRITTEN
from safetensors.torch import save_file
from torch import Tensor

from tools.comfyui.client import Inside, Install, run_inside
from wuerstchen_core.checkpoints.convert import convert
from wuerstchen_core.models.prior import Prior
from wuerstchen_core.models.text_encoder import TextEncoder, TextEncoderParams

pytestmark = pytest.mark.newest


@pytest.fixture(scope="module")
def plain() -> dict[str, Tensor]:
    return random_state(Prior(PRIOR))


@pytest.fixture(scope="module")
def inside(install: Install, plain: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Inside:
    folder = tmp_path_factory.mktemp("quantised")
    tower = TextEncoder(TextEncoderParams(width=64, heads=1, layers=1, vocab_size=500))
    for name, state in (("prior", plain), ("tower", random_state(tower))):
        save_file(state, folder / f"{name}.safetensors")
        for dtype in WRITTEN:
            convert([folder / f"{name}.safetensors"], folder / dtype, dtype=dtype)
    result = run_inside(install, "inside_quantised.py", folder, folder / "prior.safetensors", folder)
    if not result[1]["formats"]:
        pytest.skip("this ComfyUI has no quantised files")
    return result


def test_quantised_weights_equal_comfyuis(inside: Inside, plain: dict[str, Tensor]) -> None:
    tensors, facts = inside
    assert {*facts["formats"], *facts["refused"]} <= {*FORMATS} and "int8 convrot" in facts["formats"]
    assert all(name == "w4a4" and "convrot_w4a4" in text for name, text in facts["refused"].items())
    for name in facts["formats"]:
        for layer in LAYERS:
            ours, theirs = tensors[f"{name} {layer} ours"], tensors[f"{name} {layer} comfyui"]
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
            assert 0 < (ours - plain[f"{layer}.weight"]).abs().max() < 0.5


@pytest.mark.parametrize("dtype", WRITTEN)
def test_comfyuis_layers_read_our_files(inside: Inside, plain: dict[str, Tensor], dtype: str) -> None:
    """Our weights are theirs, rounded to bf16 as the other weights of the file are."""
    tensors = {
        key.removeprefix(f"{dtype} file "): x for key, x in inside[0].items() if key.startswith(f"{dtype} file ")
    }
    for layer in (*LAYERS, "embedding"):
        torch.testing.assert_close(tensors[f"{layer} ours"], tensors[f"{layer} comfyui"], rtol=2**-8, atol=1e-6)
    for layer in LAYERS:
        error = tensors[f"{layer} comfyui"] - plain[f"{layer}.weight"]
        assert error.norm() < (0.01 if dtype == "int8" else 0.03) * plain[f"{layer}.weight"].norm()
        theirs, expected = tensors[f"{layer} computed by comfyui"], tensors[f"{layer} computed"]
        assert (theirs - expected).norm() < (0.015 if dtype == "int8" else 0.05) * expected.norm()  # of 8-bit inputs


def test_our_numbers_are_comfyuis(inside: Inside) -> None:
    """ConvRot's product and the scale are rounded in another order."""
    for layer in LAYERS:
        ours, theirs = (inside[0][f"int8 file {layer} {name}"] for name in ("numbers", "numbers of comfyui"))
        assert (ours - theirs).abs().max() <= 1 and (ours != theirs).float().mean() < 1e-3
        scales = (inside[0][f"int8 file {layer} {name}"] for name in ("scale", "scale of comfyui"))
        torch.testing.assert_close(*scales, rtol=1e-6, atol=0)
