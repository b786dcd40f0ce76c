"""`convert --to diffusers` writes folders that diffusers loads whole, with the outputs of this package's networks."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.networks import DECODER, NETWORKS, TEXT
from helpers.texts import texts
from helpers.tiny_model import METADATA, tiny_parts, write_tiny_bundle

from wuerstchen_core.checkpoints import save_bundle
from wuerstchen_core.checkpoints.convert import convert
from wuerstchen_core.checkpoints.open import open_source
from wuerstchen_core.cli.main import main
from wuerstchen_core.inference.pipeline import WuerstchenPipeline
from wuerstchen_core.models.decoder import Decoder
from wuerstchen_core.models.text_encoder import tokenize

diffusers = pytest.importorskip("diffusers", minversion="0.38")
LEVELS = ("CT", "CTA", "CTA")  # diffusers has no blocks F


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    parts = tiny_parts()
    decoder = Decoder(replace(DECODER, clip_embd=TEXT.width, level_config=LEVELS))
    decoder.init_weights()
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    save_bundle(path, {**parts, "decoder": decoder}, METADATA)
    return path


@pytest.fixture(scope="module")
def folder(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("folder") / "whole"
    assert main(["convert", str(model), str(folder), "--to", "diffusers"]) == 0
    return folder


@torch.no_grad()
def test_diffusers_loads_a_whole_model(model: Path, folder: Path) -> None:
    theirs = diffusers.WuerstchenCombinedPipeline.from_pretrained(folder)
    ours = WuerstchenPipeline.load(model, device="cpu", dtype="fp32")
    prompts = [text for text in texts() if "<|" not in text][:40]
    tokens = theirs.tokenizer(prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    ids, mask = tokenize(prompts)
    assert torch.equal(tokens.input_ids, ids) and torch.equal(tokens.attention_mask, mask.long())
    assert theirs.prior_tokenizer("a red apple").input_ids == theirs.tokenizer("a red apple").input_ids
    for tower in (theirs.text_encoder, theirs.prior_text_encoder):
        states = tower(ids, attention_mask=tokens.attention_mask).last_hidden_state
        torch.testing.assert_close(states, ours.require("prior_text_encoder")(ids, mask), rtol=0, atol=1e-6)
    for name, network, own in (
        ("prior", theirs.prior_prior, ours.prior),
        ("decoder", theirs.decoder, ours.decoder),
    ):
        inputs = *NETWORKS[name].inputs()[:-1], states[:3]
        torch.testing.assert_close(network(*inputs), own(*inputs), rtol=0, atol=1e-5)
    images = torch.rand(1, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    latents = ours.require("vqgan").encode(images)
    torch.testing.assert_close(theirs.vqgan.encode(images).latents, latents, rtol=0, atol=1e-5)
    torch.testing.assert_close(theirs.vqgan.decode(latents).sample.clamp(0, 1), ours.require("vqgan").decode(latents))
    assert {type(x).__name__ for x in (theirs.scheduler, theirs.prior_scheduler)} == {"DDPMWuerstchenScheduler"}


def test_equal_files_are_stored_once(model: Path, folder: Path, tmp_path: Path) -> None:
    one, other = (folder / name / "model.safetensors" for name in ("text_encoder", "prior_text_encoder"))
    assert os.path.samefile(one, other)
    again, half = tmp_path / "again", tmp_path / "half"
    assert len(convert([folder], again, to="diffusers")) == 4
    convert([folder], half, to="diffusers", dtype="prior=bf16")
    for path in folder.rglob("*.safetensors"):
        name = path.relative_to(folder)
        assert os.path.samefile(path, again / name)
        assert os.path.samefile(path, half / name) == (name.parts[0] != "prior_prior")
    states = [open_source(path).part("prior").state_dict for path in (model, half)]
    assert all(torch.equal(x.bfloat16(), states[1][key]) for key, x in states[0].items())


@pytest.mark.parametrize(
    ("parts", "kind"),
    [
        (("prior", "text_encoder"), "WuerstchenPriorPipeline"),
        (("decoder", "vqgan", "text_encoder"), "WuerstchenDecoderPipeline"),
    ],
)
def test_stages_of_their_own(folder: Path, model: Path, tmp_path: Path, parts: tuple[str, ...], kind: str) -> None:
    convert([model], tmp_path / "parts")
    files = [tmp_path / "parts" / f"{name}.safetensors" for name in parts]
    convert(files, tmp_path / "own", to="diffusers")
    pipeline = getattr(diffusers, kind).from_pretrained(tmp_path / "own")
    whole = diffusers.WuerstchenCombinedPipeline.from_pretrained(folder)
    for name, component in pipeline.components.items():
        if isinstance(component, torch.nn.Module):
            other = whole.prior_prior if name == "prior" else getattr(whole, name)
            assert all(torch.equal(x, other.state_dict()[key]) for key, x in component.state_dict().items())
    with pytest.raises(ValueError, match="needs .*text_encoder"):
        convert(files[:-1], tmp_path / "less", to="diffusers")
    assert not (tmp_path / "less").exists()


def test_what_diffusers_cannot_read_is_refused(model: Path, folder: Path, tmp_path: Path) -> None:
    v1 = write_tiny_bundle(tmp_path / "v1.safetensors", release="v1")
    with_f = write_tiny_bundle(tmp_path / "f.safetensors")
    for source, target, dtype, fact in (
        (v1, "a", "keep", "prior"),
        (with_f, "a", "keep", "decoder"),
        (model, "a", "fp8", "fp8"),
        (model, "a.safetensors", "keep", "a.safetensors"),
    ):
        with pytest.raises(ValueError, match=fact):
            convert([source], tmp_path / target, to="diffusers", dtype=dtype)
    with pytest.raises(ValueError, match="--force"):
        convert([model], folder, to="diffusers")
    assert not (tmp_path / "a").exists()
