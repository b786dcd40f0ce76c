"""Files that ComfyUI quantised are loaded with the weights that ComfyUI's own layers restore."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.layouts import random_state
from helpers.networks import PRIOR
from inside_quantised import FORMATS, LAYERS
from safetensors.torch import save_file

from tools.comfyui.client import Install, run_inside
from wuerstchen_core.models.prior import Prior


def test_quantised_weights_equal_comfyuis(install: Install, tmp_path: Path) -> None:
    plain = random_state(Prior(PRIOR))
    save_file(plain, tmp_path / "prior.safetensors")
    tensors, facts = run_inside(install, "inside_quantised.py", tmp_path, tmp_path / "prior.safetensors", tmp_path)
    if not facts["formats"]:
        pytest.skip("this ComfyUI has no quantised files")
    assert {*facts["formats"], *facts["refused"]} <= {*FORMATS} and "int8 convrot" in facts["formats"]
    assert all(name == "w4a4" and "convrot_w4a4" in text for name, text in facts["refused"].items())
    for name in facts["formats"]:
        for layer in LAYERS:
            ours, theirs = tensors[f"{name} {layer} ours"], tensors[f"{name} {layer} comfyui"]
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
            assert 0 < (ours - plain[f"{layer}.weight"]).abs().max() < 0.5
