"""Files of `convert` in ComfyUI's loaders and in ours, and VAEs saved by ComfyUI in ours."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bundles import TINY
from inside_convert import LATENTS, calls

from tools.comfyui.client import Inside, Install, run_inside
from tools.comfyui.in_host import seeded
from wuerstchen_core.checkpoints import Part, load_decoder, load_vqgan, save_bundle
from wuerstchen_core.checkpoints.convert import convert
from wuerstchen_core.checkpoints.lazy import load_state
from wuerstchen_core.checkpoints.open import open_source
from wuerstchen_core.models.vqgan import VQGAN, VQGANParams


@pytest.fixture(scope="module")
def folder(checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The untrained model in fp8 as single files, its Stage B in int8, and Stage A in its released size."""
    folder = tmp_path_factory.mktemp("converted")
    convert([checkpoints / TINY], folder / "tiny", dtype="fp8,vqgan=fp32,image_encoder=fp32")
    convert([folder / "tiny" / "decoder.safetensors"], folder / "int8.safetensors", dtype="int8")
    vqgan = VQGAN(VQGANParams())
    vqgan.init_weights()
    save_bundle(folder / "a.safetensors", {"vqgan": Part("vqgan", vqgan.params, vqgan.state_dict())}, {})
    convert([folder / "a.safetensors"], folder / "released")
    return folder


@pytest.fixture(scope="module")
def inside(install: Install, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Inside:
    return run_inside(install, "inside_convert.py", tmp_path_factory.mktemp("convert"), folder)


def test_comfyui_loads_stage_a_and_recognises_the_text_encoders(inside: Inside, folder: Path) -> None:
    assert inside[1]["stage_a"] == "StageA"
    with torch.inference_mode():
        expected = load_vqgan(folder / "released" / "vqgan.safetensors").decode(seeded(*LATENTS))
    torch.testing.assert_close(inside[0]["stage_a"], expected, rtol=0, atol=2e-4 * float(expected.std()))
    assert (inside[1]["CLIP_H"], inside[1]["CLIP_G"]) == ("CLIP_H", "CLIP_G")


@pytest.mark.parametrize(("dtype", "file"), [("fp8", "tiny/decoder.safetensors"), ("int8", "int8.safetensors")])
def test_files_in_8_bits_are_dequantised(inside: Inside, folder: Path, dtype: str, file: str) -> None:
    """In ComfyUI as in the core."""
    assert inside[1][dtype] in ("torch.bfloat16", "torch.float32")
    decoder = load_decoder(folder / file, dtype=torch.float32)
    x, t, features, text = calls()
    with torch.inference_mode():
        expected = decoder(x, t, features, text)
    torch.testing.assert_close(inside[0][dtype], expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["vqgan", "image_encoder"])
def test_vaes_saved_by_comfyui_load_back(inside: Inside, folder: Path, name: str) -> None:
    sources = [open_source(path / f"{name}.safetensors") for path in (folder, folder / "tiny")]
    saved, original = (load_state(source.networks[name].tensors) for source in sources)
    assert saved.keys() == original.keys()
    assert all(x.equal(original[key]) for key, x in saved.items())
