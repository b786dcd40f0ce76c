"""Trained weights carry on what their base said, with what training changed."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.tiny_model import METADATA
from helpers.tiny_stages import config_path, input_overrides
from safetensors import safe_open

from wuerstchen_core import WuerstchenPipeline
from wuerstchen_core.checkpoints import read_metadata, read_part, save_bundle
from wuerstchen_core.checkpoints.convert import convert
from wuerstchen_core.checkpoints.open import open_source
from wuerstchen_core.training.run import run
from wuerstchen_core.training.stages.networks import base_metadata

pytest.importorskip("resvg_py", reason="drawing needs resvg-py")

SAMPLING = {**METADATA["sampling"], "width": 256, "height": 128}
TRAINED = {"width": 64, "height": 64}  # the size of the training pictures


def base_file(run_folder: Path, path: Path, stage: str) -> Path:
    """Writes a stage's weights as a bundle with settings and a vocabulary."""
    part = read_part(run_folder / stage / f"{stage}.safetensors", stage)
    save_bundle(path, {stage: part}, {**METADATA, "sampling": SAMPLING})
    return path


def tuned(run_folder: Path, folder: Path, stage: str, base: Path, *changes: str) -> Path:
    overrides = [*input_overrides(run_folder), f"run='{folder}'", f"start='{base}'", "train.steps=2", *changes]
    return run(stage, config_path(run_folder, stage), overrides)


def test_a_tuned_prior_has_its_bases_settings_and_words(run_folder: Path, tmp_path: Path) -> None:
    base = base_file(run_folder, tmp_path / "base.safetensors", "prior")
    file = tuned(run_folder, tmp_path, "prior", base)
    of_diffusers = open_source(tmp_path / "prior" / "diffusers" / "prior")
    for metadata in (read_metadata(file), of_diffusers.metadata):
        assert metadata["sampling"] == {**SAMPLING, **TRAINED}
        assert (metadata["vocabulary"], metadata["licence"]) == (METADATA["vocabulary"], "MIT")
    assert (read_metadata(file)["base"], read_metadata(file)["training"]) == ("base.safetensors", {"step": 2})
    # Alone, as a part of another model, and tuned again.
    for pipeline in (
        WuerstchenPipeline.load({"prior": file}, device="cpu"),
        WuerstchenPipeline.load({"prior": file, "decoder": run_folder / "decoder/decoder.safetensors"}, device="cpu"),
        WuerstchenPipeline.load(run_folder / "bundle.safetensors", device="cpu", prior=file),
    ):
        assert (pipeline.sampling.width, pipeline.sampling.prior_steps) == (64, SAMPLING["prior_steps"])
        assert pipeline.metadata["vocabulary"] == METADATA["vocabulary"]
    again = tuned(run_folder, tmp_path / "again", "prior", file, "data.canvas=128", "inputs.text='demo'", "model={}")
    assert read_metadata(again)["sampling"] == {**SAMPLING, "width": 128, "height": 128}


def test_a_prior_from_nothing_has_the_size_of_its_pictures(run_folder: Path) -> None:
    file = run_folder / "prior" / "prior.safetensors"
    assert read_metadata(file)["sampling"] == TRAINED
    assert WuerstchenPipeline.load({"prior": file}, device="cpu").sampling.width == 64


def test_a_tuned_decoder_has_only_the_settings_of_stage_b(run_folder: Path, tmp_path: Path) -> None:
    base = base_file(run_folder, tmp_path / "base.safetensors", "decoder")
    metadata = read_metadata(tuned(run_folder, tmp_path, "decoder", base))
    assert metadata["sampling"] == {"decoder_steps": SAMPLING["decoder_steps"]}
    assert "vocabulary" not in metadata and metadata["licence"] == "MIT"


def test_other_parts_do_not_limit_the_words_of_a_model(tmp_path: Path) -> None:
    assert base_metadata(["demo"], "vqgan").keys() == {"base", "licence"}
    assert base_metadata(["demo"], "image_encoder").keys() == {"base", "licence"}
    assert base_metadata(["demo"], "text_encoder").keys() == {"base", "licence", "vocabulary"}
    assert base_metadata(["demo-v1"], "token_decoder")["sampling"].keys() == {
        "decoder_steps", "decoder_guidance", "token_mode",
    }  # fmt: skip
    assert base_metadata([], "prior") == {}


def test_a_converted_model_of_tuned_parts_has_their_settings(run_folder: Path, tmp_path: Path) -> None:
    prior = tuned(run_folder, tmp_path, "prior", base_file(run_folder, tmp_path / "base.safetensors", "prior"))
    decoder = tmp_path / "decoder.safetensors"
    other = {"width": 512, "height": 512, "decoder_steps": 9, "decoder_guidance": 2.0}
    save_bundle(
        decoder, {"decoder": read_part(run_folder / "decoder/decoder.safetensors", "decoder")}, {"sampling": other}
    )
    [bundle] = convert([decoder, prior], tmp_path / "bundle.safetensors")  # the prior counts wherever it stands
    expected = {**SAMPLING, **TRAINED, "decoder_guidance": 2.0}
    assert read_metadata(bundle)["sampling"] == expected
    for file in convert([bundle], tmp_path / "single"):
        assert read_metadata(file)["sampling"] == expected
        with safe_open(file, "pt") as content:
            assert "wuerstchen" in content.metadata()
