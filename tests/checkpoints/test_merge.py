"""Tests merging LoRA files into a pipeline's networks, from Python and the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.golden_data import assert_near
from helpers.lora_forms import ALPHA, FORMS, RANK, attention_of_prior, attention_of_tower, random_factors
from helpers.networks import NETWORKS, TEXT
from helpers.tiny_model import write_tiny_bundle
from PIL import Image
from safetensors.torch import save_file

from wuerstchen_core import WuerstchenPipeline
from wuerstchen_core.cli.main import main
from wuerstchen_core.cli.options import fingerprint
from wuerstchen_core.models.prior import Prior
from wuerstchen_core.models.text_encoder import TextEncoder, tokenize

DIFFUSERS, SCALE = FORMS["diffusers"], ALPHA / RANK
NETWORK = random_factors(attention_of_prior())
WORDS = random_factors(attention_of_tower(TEXT.width), seed=1) | random_factors(
    {
        "encoder.layers.1.mlp.fc1": (4 * TEXT.width, TEXT.width),
        "encoder.layers.1.mlp.fc2": (TEXT.width, 4 * TEXT.width),
    },
    seed=2,
)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bundle(tmp_path_factory.mktemp("merge") / "tiny.safetensors")


@pytest.fixture(scope="module")
def files(bundle: Path) -> dict[str, Path]:
    """LoRA files by name; only the first two fit."""
    wide = random_factors(attention_of_prior(128))
    states = {
        "both": DIFFUSERS.write(NETWORK, WORDS),
        "prior": DIFFUSERS.write(NETWORK, {}),
        "wide": DIFFUSERS.write(wide, {}),
        "words": DIFFUSERS.write({}, random_factors(attention_of_tower(64))),
        "sdxl": {f"lora_unet_input_blocks_4_1_attn1_to_q.lora_{s}.weight": torch.ones(4, 4) for s in ("up", "down")},
        "more": {**DIFFUSERS.write(NETWORK, {}), "prior.projection.lora_mid.weight": torch.ones(1)},
    }  # fmt: skip
    paths = {name: bundle.with_name(f"{name}.safetensors") for name in states}
    for name, state in states.items():
        save_file(state, paths[name])
    return paths


def load(bundle: Path, **options: Any) -> WuerstchenPipeline:
    return WuerstchenPipeline.load(bundle, device="cpu", dtype="fp32", **options)


def test_the_prior_and_its_text_tower_change_but_not_the_decoders(bundle: Path, files: dict[str, Path]) -> None:
    plain, changed = load(bundle), load(bundle, lora={files["both"]: 0.5})
    prior, tower = plain.prior, plain.prior_text_encoder
    assert isinstance(prior, Prior) and isinstance(tower, TextEncoder) and changed.prior and changed.prior_text_encoder
    inputs, words = NETWORKS["prior"].inputs(), tokenize(["a red apple"])
    before = prior(*inputs), tower(*words)
    for path, (up, down) in NETWORK.items():
        prior.get_parameter(f"{path}.weight").add_(up @ down, alpha=0.5 * SCALE)
    block = tower.transformer.resblocks
    change = {path.rpartition(".")[2]: up @ down * (0.5 * SCALE) for path, (up, down) in WORDS.items()}
    block[0].attn.in_proj_weight += torch.cat([change[f"{name}_proj"] for name in "qkv"])
    block[0].attn.out_proj.weight += change["out_proj"]
    block[1].mlp.c_fc.weight += change["fc1"]
    block[1].mlp.c_proj.weight += change["fc2"]
    assert_near(changed.prior(*inputs), prior(*inputs), 1e-5)
    assert_near(changed.prior_text_encoder(*words), tower(*words), 1e-5)
    assert (prior(*inputs) - before[0]).abs().max() > 0.01 and (tower(*words) - before[1]).abs().max() > 0.01
    assert changed.decoder_text_encoder is not None
    assert torch.equal(changed.decoder_text_encoder(*words), before[1])
    assert not any(
        p.requires_grad for network in (changed.prior, changed.prior_text_encoder) for p in network.parameters()
    )


def test_several_loras_add_up(bundle: Path, files: dict[str, Path]) -> None:
    inputs = NETWORKS["prior"].inputs()
    plain, there_and_back = load(bundle).prior, load(bundle, lora={files["both"]: 2.0, files["prior"]: -2.0}).prior
    assert plain is not None and there_and_back is not None
    assert_near(there_and_back(*inputs), plain(*inputs), 1e-5)


REJECTED = {
    "wide": ("prior", "15 more", "64x64", "128x128"),
    "sdxl": ("prior", "1 more", "Stable Diffusion or SDXL"),
    "words": ("prior text encoder", "7 more", "32x32"),
    "more": ("prior.projection.lora_mid.weight",),
}


@pytest.mark.parametrize("name", REJECTED)
def test_a_lora_that_does_not_fit_is_rejected_in_one_line(bundle: Path, files: dict[str, Path], name: str) -> None:
    with pytest.raises(ValueError, match="^") as error:
        load(bundle, lora=files[name])
    assert all(fact in str(error.value) for fact in (f"{name}.safetensors", *REJECTED[name])), error.value
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_a_strength_is_a_number(bundle: Path, files: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=r"prior\.safetensors.*nan"):
        load(bundle, lora={files["prior"]: float("nan")})


def test_a_model_without_a_prior_rejects_a_lora(bundle: Path, files: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=r"prior\.safetensors.*prior"):
        load(write_tiny_bundle(bundle.with_name("rest.safetensors"), without=("prior",)), lora=files["prior"])


def test_the_command_uses_loras_and_records_them(
    bundle: Path, files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["generate", "a red apple", "--model", str(bundle), "--device", "cpu", "--dtype", "fp32", "--seed", "3"]
    loras = ["--lora", f"{files['both']}:-1.5", "--lora", str(files["prior"])]
    for name, options in {"plain": [], "changed": loras}.items():
        assert main([*command, *options, "--output", str(tmp_path / f"{name}.png")]) == 0
    plain, changed = (Image.open(tmp_path / f"{name}.png") for name in ("plain", "changed"))
    metadata = [json.loads(image.info["wuerstchen"]) for image in (plain, changed)]
    assert "loras" not in metadata[0]
    assert metadata[1]["loras"] == [
        {"file": f"{name}.safetensors", "weights": fingerprint(files[name]), "strength": strength}
        for name, strength in (("both", -1.5), ("prior", 1.0))
    ]
    assert (np.asarray(plain) != np.asarray(changed)).any()
    pipeline = load(bundle, lora={files["both"]: -1.5, files["prior"]: 1.0})
    [expected] = pipeline.generate("a red apple", seed=3)
    assert np.array_equal(np.asarray(expected), np.asarray(changed))
    assert main([*command, "--lora", str(tmp_path / "none.safetensors")]) == 2
    assert "none.safetensors" in capsys.readouterr().err
