"""Sources of a pipeline, and its precision."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.cli_runs import PROMPT, ROUNDING, latents, pixels
from helpers.networks import DECODER, PRIOR, TEXT, VQ
from helpers.tiny_model import METADATA, write_tiny_bundle
from PIL import Image

from wuerstchen_core import WuerstchenPipeline
from wuerstchen_core.checkpoints import PARTS_OF, read_part, save_bundle
from wuerstchen_core.checkpoints.convert import convert
from wuerstchen_core.common import devices
from wuerstchen_core.common.devices import pick_dtype
from wuerstchen_core.inference.settings import SamplingSettings
from wuerstchen_core.models.text_encoder import TextEncoder
from wuerstchen_core.models.vqgan import VQGAN

# The stages that are trained, and the part that each writes.
STAGES = {
    "vqgan": "vqgan", "encoder": "image_encoder", "text": "text_encoder", "decoder": "decoder", "prior": "prior",
}  # fmt: skip
TOWER = {"text_encoder": "prior_text_encoder"}


@pytest.fixture(scope="module")
def pipe(bundle: Path) -> WuerstchenPipeline:
    return WuerstchenPipeline.load(bundle, device="cpu", dtype="fp32")


# sources


def test_one_tower_is_loaded_once(pipe: WuerstchenPipeline) -> None:
    assert pipe.prior_text_encoder is pipe.decoder_text_encoder
    assert not any(p.requires_grad for name in PARTS_OF["v2"] for p in getattr(pipe, name).parameters())


def test_files_by_part(pipe: WuerstchenPipeline, bundle: Path, tmp_path: Path) -> None:
    sources = {}
    for name in PARTS_OF["v2"]:
        sources[name] = tmp_path / f"{name}.safetensors"
        save_bundle(sources[name], {name: read_part(bundle, name)}, METADATA if name == "prior" else {})
    loaded = WuerstchenPipeline.load(sources, device="cpu", dtype="fp32")
    assert np.abs(pixels(loaded.generate(PROMPT)) - pixels(pipe.generate(PROMPT))).max() <= ROUNDING


@pytest.mark.parametrize("main", ["prior", "vqgan"])
def test_the_metadata_of_files_by_part_is_used(bundle: Path, tmp_path: Path, main: str) -> None:
    convert([bundle], tmp_path / "folder")
    sources: dict[str, Any] = {main: tmp_path / "folder", "image_encoder": bundle}
    loaded = WuerstchenPipeline.load(sources, device="cpu")
    assert loaded.metadata["vocabulary"] == METADATA["vocabulary"]
    assert loaded.sampling == WuerstchenPipeline.load(bundle, device="cpu").sampling != SamplingSettings()


def test_a_folder_of_trained_files(bundle: Path, pipe: WuerstchenPipeline, tmp_path: Path) -> None:
    for stage, name in STAGES.items():
        save_bundle(tmp_path / stage / f"{stage}.safetensors", {name: read_part(bundle, TOWER.get(name, name))}, {})
    loaded = WuerstchenPipeline.load(tmp_path, device="cpu", dtype="fp32")
    options = METADATA["sampling"]
    assert np.abs(pixels(loaded.generate(PROMPT, **options)) - pixels(pipe.generate(PROMPT))).max() <= ROUNDING


def test_a_model_without_its_prior_still_reconstructs(tmp_path: Path) -> None:
    path = write_tiny_bundle(tmp_path / "half.safetensors", without=("prior",))
    half = WuerstchenPipeline.load(path, device="cpu")
    with pytest.raises(ValueError, match="no prior"):
        half.generate(PROMPT)
    assert half.reconstruct(Image.new("RGB", (64, 64), "red"))[0].size == (64, 64)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("nowhere.safetensors", {}, "nowhere.safetensors does not exist"),
        ({}, {}, "prior, decoder"),
        ({"unet": "x"}, {}, "'unet'.*prior"),
        (None, {"dtype": "int4"}, "'int4'.*auto, fp32, bf16, fp16, int8$"),
        (None, {"dtype": torch.int16}, "'torch.int16'"),
        (None, {"device": "abacus"}, "'abacus'.*auto, .*cpu"),
        (None, {"device": "vulkan"}, "'vulkan'.*auto, .*cpu"),
        (None, {"device": "cuda:99"}, "'cuda:99'.*auto, .*cpu"),
    ],
    ids=str,
)
def test_invalid_sources_and_arguments(bundle: Path, source: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WuerstchenPipeline.load(bundle if source is None else source, **options)


def test_a_tower_of_another_width_is_named(bundle: Path, tmp_path: Path) -> None:
    save_bundle(tmp_path / "wide.safetensors", {"text_encoder": TextEncoder(replace(TEXT, width=64))}, {})
    sources = {"prior": bundle, "prior_text_encoder": tmp_path / "wide.safetensors"}
    with pytest.raises(ValueError, match="prior.*32.*64"):
        WuerstchenPipeline.load(sources, device="cpu")


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"sampling": [1]}, "sampling"),
        ({"vocabulary": ["a"]}, "vocabulary"),
        ({"vocabulary": {"larger": "512"}}, "larger"),
        ({"sampling": {"width": "wide"}}, "'width': 'wide'"),
        ({"sampling": {"decoder_steps": "many"}}, "'decoder_steps': 'many'"),
    ],
    ids=str,
)
def test_metadata_that_does_not_fit(tmp_path: Path, metadata: dict[str, Any], message: str) -> None:
    save_bundle(tmp_path / "odd.safetensors", {"vqgan": VQGAN(VQ)}, metadata)
    with pytest.raises(ValueError, match=message):
        WuerstchenPipeline.load(tmp_path / "odd.safetensors", device="cpu")


def test_a_pipeline_without_networks_says_so() -> None:
    with pytest.raises(ValueError, match="no network"):
        _ = WuerstchenPipeline().device


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there(bundle: Path) -> None:
    with pytest.raises(ValueError, match="'cuda'.*auto"):
        WuerstchenPipeline.load(bundle, device="cuda")


def diffusers_folder(folder: Path) -> Path:
    """Writes a tiny combined pipeline as diffusers saves it, with text encoders of two widths."""
    from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel, WuerstchenDiffNeXt, WuerstchenPrior
    from transformers import CLIPTextConfig, CLIPTextModel

    def tower(width: int) -> CLIPTextModel:
        return CLIPTextModel(
            CLIPTextConfig(
                hidden_size=width,
                intermediate_size=4 * width,
                num_hidden_layers=TEXT.layers,
                num_attention_heads=2,
                hidden_act="gelu",
                eos_token_id=49407,
            )
        )

    torch.manual_seed(0)
    components = {
        "prior_prior": WuerstchenPrior(
            c_in=16, c=PRIOR.c, c_cond=PRIOR.c_cond, c_r=64, depth=PRIOR.depth, nhead=PRIOR.nhead
        ),
        "decoder": WuerstchenDiffNeXt(
            c_cond=DECODER.c_cond,
            c_hidden=list(DECODER.c_hidden),
            nhead=list(DECODER.nhead),
            blocks=list(DECODER.blocks),
            level_config=["CT", "CTA", "CTA"],
            inject_effnet=list(DECODER.inject_effnet),
            clip_embd=DECODER.clip_embd,
            dropout=[0.0] * 3,
        ),
        "vqgan": PaellaVQModel(
            levels=VQ.levels,
            bottleneck_blocks=VQ.bottleneck_blocks,
            embed_dim=VQ.c_hidden,
            latent_channels=4,
            num_vq_embeddings=VQ.codebook_size,
        ),
        "prior_text_encoder": tower(PRIOR.c_cond),
        "text_encoder": tower(DECODER.clip_embd),
    }
    for name, network in components.items():
        network.save_pretrained(folder / name)
    return folder


def test_a_diffusers_folder(tmp_path: Path) -> None:
    folder = diffusers_folder(tmp_path / "folder")
    loaded = WuerstchenPipeline.load(folder, device="cpu", dtype="fp32")
    assert loaded.sampling == SamplingSettings() and loaded.image_encoder is None
    assert loaded.prior_text_encoder is not loaded.decoder_text_encoder
    options: dict[str, Any] = {"width": 128, "height": 64, "prior_steps": 2, "decoder_steps": 2}
    images = loaded.generate(PROMPT, **options)
    assert images[0].size == (128, 64)
    with pytest.raises(ValueError, match="image encoder"):
        loaded.encode(images[0])

    parts = {name: read_part(folder, name) for name in PARTS_OF["v2"] if name != "image_encoder"}
    save_bundle(tmp_path / "same.safetensors", parts, {})
    same = WuerstchenPipeline.load(tmp_path / "same.safetensors", device="cpu", dtype="fp32")
    assert np.abs(pixels(same.generate(PROMPT, **options)) - pixels(images)).max() <= ROUNDING


# precision


def test_bf16_encodes_pictures_in_fp32(bundle: Path, pipe: WuerstchenPipeline) -> None:
    half = WuerstchenPipeline.load(bundle, device="cpu", dtype="bf16")
    kinds = {name: next(getattr(half, name).parameters()).dtype for name in PARTS_OF["v2"]}
    assert kinds.pop("image_encoder") == torch.float32 and set(kinds.values()) == {torch.bfloat16}
    features, latents_b = latents(half, [PROMPT], seed=0)
    assert features.dtype == latents_b.dtype == torch.float32 and latents_b.isfinite().all()
    exact, _ = latents(pipe, [PROMPT], seed=0)
    assert 0 < float((features - exact).std() / exact.std()) < 0.2


LARGE = 10**9


@pytest.mark.parametrize(
    ("instructions", "parameters", "expected"),
    [
        ({"vnni", "avx512_bf16"}, LARGE, torch.int8),
        ({"vnni"}, LARGE, torch.int8),
        ({"vnni", "avx512_bf16", "amx_tile"}, LARGE, torch.bfloat16),
        ({"avx512_bf16"}, LARGE, torch.bfloat16),
        (set(), LARGE, torch.float32),
        ({"vnni", "avx512_bf16"}, 10**7, torch.float32),
    ],
)
def test_auto_dtype(
    monkeypatch: pytest.MonkeyPatch, instructions: set[str], parameters: int, expected: torch.dtype
) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(devices, "has_int8", lambda: "vnni" in instructions)
    monkeypatch.setattr(devices, "_cpu_has", instructions.__contains__)
    assert pick_dtype("auto", cpu, parameters) == expected
    assert pick_dtype("auto", cpu, parameters, allow_int8=False) == (
        devices.companion_dtype(cpu) if expected == torch.int8 else expected
    )


def test_auto_dtype_of_networks(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(devices, "LARGE_MODEL", 1)
    monkeypatch.setattr(devices, "prefers_int8", lambda device: device.type == "cpu")
    monkeypatch.setattr(WuerstchenPipeline, "compile", lambda self: None)
    chosen = WuerstchenPipeline.load(bundle, device="cpu")
    assert chosen.dtype == torch.int8
    chosen.save(tmp_path / "saved.safetensors")
    assert "saved.safetensors" in caplog.text and "int8" in caplog.text
    for options in ({"compile": True}, {"source": "demo-v1"}):
        other = WuerstchenPipeline.load(**{"source": bundle, "device": "cpu", **options})
        assert other.dtype == devices.companion_dtype(torch.device("cpu"))
