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
from safetensors.torch import load_file, save_file

from tools.demo.lora import LORA
from wuerstchen_core import WuerstchenPipeline
from wuerstchen_core.checkpoints import read_part
from wuerstchen_core.checkpoints.adapters import merge_lora
from wuerstchen_core.checkpoints.fingerprint import fingerprint
from wuerstchen_core.checkpoints.lora_files import read_lora
from wuerstchen_core.cli.main import main
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
    """LoRA files by name; the first three fit, and part of the fourth."""
    wide = random_factors(attention_of_prior(128))
    states = {
        "both": DIFFUSERS.write(NETWORK, WORDS),
        "prior": DIFFUSERS.write(NETWORK, {}),
        "stage b": {"prior.clf.1.diff_b": torch.ones(32), "prior.clip_mapper.diff": torch.ones(32, TEXT.width)},
        "more": {
            **DIFFUSERS.write(NETWORK, {}),
            "prior.projection.a1.weight": torch.ones(1),
            "prior.blocks.9.mapper.diff": torch.ones(1),
            "prior.out.1.diff_b": torch.ones(7),
        },
        "wide": DIFFUSERS.write(wide, {}),
        "words": DIFFUSERS.write({}, random_factors(attention_of_tower(64))),
        "sdxl": {f"lora_unet_input_blocks_4_1_attn1_to_q.lora_{s}.weight": torch.ones(4, 4) for s in ("up", "down")},
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
    "wide": ("prior", "16 keys", "64x64", "128x128"),
    "sdxl": ("prior", "2 keys", "Stable Diffusion or SDXL"),
    "words": ("prior text encoder", "8 keys", "32x32"),
}


@pytest.mark.parametrize("name", REJECTED)
def test_a_lora_that_does_not_fit_is_rejected_in_one_line(bundle: Path, files: dict[str, Path], name: str) -> None:
    with pytest.raises(ValueError, match="^") as error:
        load(bundle, lora=files[name])
    assert all(fact in str(error.value) for fact in (f"{name}.safetensors", *REJECTED[name])), error.value
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_the_rest_of_a_partly_fitting_lora_is_applied(
    bundle: Path, files: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    part, whole = load(bundle, lora=files["more"]).prior, load(bundle, lora=files["prior"]).prior
    assert part is not None and whole is not None
    assert all(torch.equal(x, whole.state_dict()[key]) for key, x in part.state_dict().items())
    [line] = caplog.messages
    facts = (
        "more.safetensors",
        "projection.a1.weight",
        "blocks.9.mapper.diff",
        "out.1.bias: it is 32, its change is 7",
    )
    assert "\n" not in line and line.count("1 keys") == 3 and all(fact in line for fact in facts), line


def test_a_lora_of_stage_b_is_merged_into_stage_b(bundle: Path, files: dict[str, Path]) -> None:
    plain, changed = load(bundle), load(bundle, lora={files["stage b"]: 0.5})
    assert plain.decoder and changed.decoder and plain.prior and changed.prior
    for key, x in changed.decoder.state_dict().items():
        change = 0.5 * (key in ("clf.1.bias", "clip_mapper.weight"))
        assert torch.equal(x, plain.decoder.state_dict()[key] + change), key
    assert all(torch.equal(x, plain.prior.state_dict()[key]) for key, x in changed.prior.state_dict().items())


def test_text_keys_name_the_stage(bundle: Path) -> None:
    file, key = bundle.with_name("clip_h.safetensors"), "text_encoders.clip_h.transformer.text_model"
    save_file({f"{key}.final_layer_norm.diff_b": torch.ones(TEXT.width)}, file)
    plain, changed = load(bundle), load(bundle, lora=file)
    assert plain.prior_text_encoder and changed.prior_text_encoder and changed.decoder_text_encoder
    before, words = plain.prior_text_encoder.ln_final.bias, changed.decoder_text_encoder.ln_final.bias
    assert torch.equal(changed.prior_text_encoder.ln_final.bias, before) and torch.equal(words, before + 1)


def test_convert_writes_comfyuis_keys(
    bundle: Path, files: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source, target = tmp_path / "kohya.pt", tmp_path / "out.safetensors"
    torch.save(FORMS["onetrainer kohya"].write(NETWORK, WORDS), source)
    assert main(["convert", str(source), str(target)]) == 0
    prefixes = ("diffusion_model.", NETWORK), ("text_encoders.clip_g.transformer.text_model.", WORDS)
    expected = {f"{prefix}{path}": factors for prefix, part in prefixes for path, factors in part.items()}
    written = load_file(target)
    assert written.keys() == {
        f"{path}.{x}" for path in expected for x in ("lora_up.weight", "lora_down.weight", "alpha")
    }
    for path, (up, down) in expected.items():
        assert torch.equal(written[f"{path}.lora_up.weight"], up) and torch.equal(
            written[f"{path}.lora_down.weight"], down
        )
    assert main(["convert", str(target), str(tmp_path / "again.safetensors")]) == 0
    assert (tmp_path / "again.safetensors").read_bytes() == target.read_bytes()
    assert main(["convert", str(files["more"]), str(target)]) == 2 and load_file(target).keys() == written.keys()
    assert main(["convert", str(files["more"]), str(target), "--force"]) == 0
    [line] = caplog.messages
    assert "more.safetensors" in line and "prior.projection.a1.weight" in line
    assert "diffusion_model.out.1.diff_b" in load_file(target)
    assert main(["convert", str(source), str(tmp_path / "folder")]) == 2
    assert main(["convert", str(source), str(tmp_path / "x.safetensors"), "--dtype", "bf16"]) == 2
    assert not (tmp_path / "folder").exists() and not (tmp_path / "x.safetensors").exists()


def test_the_shipped_lora_has_comfyuis_keys() -> None:
    lora, prior = read_lora(LORA), read_part("demo", "prior").state_dict
    assert all(key.startswith("diffusion_model.") for key in lora.keys) and not lora.unknown
    merged = merge_lora(prior, lora.network)
    assert sum(not torch.equal(x, prior[key]) for key, x in merged.items()) == len(lora.network) == 24


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
        {"file": f"{name}.safetensors", "weights": fingerprint(files[name]), "strength": strength, "stage": "prior"}
        for name, strength in (("both", -1.5), ("prior", 1.0))
    ]
    assert (np.asarray(plain) != np.asarray(changed)).any()
    pipeline = load(bundle, lora={files["both"]: -1.5, files["prior"]: 1.0})
    [expected] = pipeline.generate("a red apple", seed=3)
    assert np.array_equal(np.asarray(expected), np.asarray(changed))
    assert main([*command, "--lora", str(tmp_path / "none.safetensors")]) == 2
    assert "none.safetensors" in capsys.readouterr().err
