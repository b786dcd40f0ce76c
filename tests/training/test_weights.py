"""Trained weights: bundles that generate images, files for diffusers, and runs that start from trained weights."""

from __future__ import annotations

import logging
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.networks import TEXT
from helpers.tiny_stages import (
    ALL,
    DIFFUSERS,
    STAGES,
    assert_equal_states,
    config_path,
    input_overrides,
    read_log,
)
from safetensors.torch import load_file

from tools.bench.diffusers_baseline import network_class
from tools.demo import build, build_v1
from tools.demo.joint import RECIPES
from wuerstchen_core import WuerstchenPipeline
from wuerstchen_core.checkpoints import PARTS_OF, load_control_net, read_metadata, read_part, save_bundle
from wuerstchen_core.checkpoints.inspect import describe
from wuerstchen_core.checkpoints.key_maps import vqgan_key_to_diffusers
from wuerstchen_core.checkpoints.quant import FP8
from wuerstchen_core.checkpoints.release import check_control
from wuerstchen_core.inference.settings import SamplingSettings
from wuerstchen_core.models.decoder import Decoder
from wuerstchen_core.models.image_encoder import ImageEncoder
from wuerstchen_core.models.text_encoder import TextEncoder
from wuerstchen_core.training.run import run

pytest.importorskip("resvg_py", reason="drawing needs resvg-py")


@pytest.mark.parametrize("stage", ALL)
def test_every_stage_can_start_from_its_own_weights(run_folder: Path, tmp_path: Path, stage: str) -> None:
    """With almost no learning rate the weights stay: nothing is initialised again."""
    base = (run_folder if stage in STAGES else run_folder / "v1") / stage / f"{stage}.safetensors"
    changes = [
        f"run='{tmp_path}'",
        *input_overrides(base.parents[1]),
        f"start='{base}'",
        "train.lr=1e-12",
        "train.muon_lr=0",
    ]
    if stage == "vqgan":
        changes.append("vqgan.quantize_from=2")
    tuned = run(stage, config_path(run_folder, stage), changes)
    for key, x in load_file(tuned).items():
        if "running_" not in key and "num_batches" not in key:
            torch.testing.assert_close(x, load_file(base)[key], rtol=0, atol=1e-8)


@pytest.mark.parametrize("stage", DIFFUSERS)
def test_diffusers_loads_trained_weights(run_folder: Path, stage: str) -> None:
    pytest.importorskip("diffusers")
    theirs = network_class(stage).from_pretrained(run_folder / stage / "diffusers" / stage)
    ours = read_part(run_folder / stage / f"{stage}.safetensors", stage)
    sizes = {
        name: value for name, value in asdict(ours.params).items() if name != "dropout"
    }  # diffusers has no key for it
    assert asdict(read_part(run_folder / stage / "diffusers" / stage, stage).params).items() >= sizes.items()
    assert_equal_states(
        {vqgan_key_to_diffusers(key): x for key, x in ours.state_dict.items()}, dict(theirs.state_dict())
    )


def test_a_stage_starts_from_the_weights_of_another_run(run_folder: Path, tmp_path: Path) -> None:
    """With another dropout and almost no learning rate, the weights stay and the licence is passed on."""
    base = tmp_path / "base.safetensors"
    part = read_part(run_folder / "prior" / "prior.safetensors", "prior")
    save_bundle(base, {"prior": replace(part, params=replace(part.params, dropout=0.0))}, {"licence": "MIT, of a base"})
    before = base.read_bytes()
    config = tmp_path / "tune.toml"
    text = (run_folder / "prior.toml").read_text("utf-8")
    model = text.index("[model]")
    config.write_text(f"start = '{base}'\n" + text[:model] + text[text.index("[noise]") :], encoding="utf-8")
    overrides = [f"run='{tmp_path}'", *input_overrides(run_folder), "train.lr=1e-12", "train.muon_lr=0"]
    tuned = run("prior", config, [*overrides, "model.dropout=0.3"])
    assert read_part(tuned, "prior").params == replace(part.params, dropout=0.3)
    for key, x in read_part(tuned, "prior").state_dict.items():
        torch.testing.assert_close(x, part.state_dict[key], rtol=0, atol=1e-9)
    metadata = read_metadata(tuned)
    assert (metadata["licence"], metadata["base"]) == ("MIT, of a base", "base.safetensors")
    assert base.read_bytes() == before
    with pytest.raises(ValueError, match="missing"):
        run("prior", config, [*overrides, "model.depth=2", "run='elsewhere'"])


def test_licences_are_passed_on_from_folders(run_folder: Path, inputs: list[str], tmp_path: Path) -> None:
    """From a model card, as in published folders, and from both layouts that a run writes."""
    base = tmp_path / "base"
    shutil.copytree(run_folder / "prior" / "diffusers" / "prior", base / "prior")
    (base / "README.md").write_text("---\ntags: [x]\nlicense: cc-by-nc-4.0\n---\nlicense: none\n", encoding="utf-8")
    changes = [*inputs, "model.depth=1", "train.steps=2"]
    first, second = tmp_path / "first", tmp_path / "second"
    trained = run("prior", config_path(run_folder, "prior"), [*changes, f"run='{first}'", f"start='{base}'"])
    of_diffusers = first / "prior" / "diffusers" / "prior"
    for source in (trained, of_diffusers):
        assert describe(source).licence == "cc-by-nc-4.0"
    again = run("prior", config_path(run_folder, "prior"), [*changes, f"run='{second}'", f"start='{of_diffusers}'"])
    assert (read_metadata(again)["licence"], read_metadata(again)["base"]) == ("cc-by-nc-4.0", "prior")
    alone = shutil.copytree(base / "prior", tmp_path / "alone")  # a component with its own card
    assert describe(alone).licence is None
    shutil.copy(base / "README.md", alone)
    assert describe(alone).licence == "cc-by-nc-4.0"


def test_each_stage_uses_its_own_text_encoder(run_folder: Path, inputs: list[str], tmp_path: Path) -> None:
    """The right one is chosen from a source with both; a width that the stage cannot use is refused."""
    both = tmp_path / "both.safetensors"
    towers = {"prior_text_encoder": TEXT, "decoder_text_encoder": replace(TEXT, width=64)}
    save_bundle(both, {name: TextEncoder(params) for name, params in towers.items()}, {})
    overrides = [*inputs, f"run='{tmp_path}'", f"inputs.text='{both}'", "train.steps=1"]
    fits = {"prior": "model.c_cond=32", "decoder": "model.clip_embd=64"}
    for stage, width in fits.items():
        assert run(stage, config_path(run_folder, stage), [*overrides, width]).exists()
        with pytest.raises(ValueError, match=rf"{stage} .*\[inputs\]"):
            run(stage, config_path(run_folder, stage), [*overrides, width.replace("32", "48").replace("64", "48")])


def test_missing_networks_for_samples_are_reported(
    run_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    overrides = [
        *input_overrides(run_folder, but="decoder"),
        f"run='{tmp_path}'",
        "train.steps=1",
        "train.sheet_every=1",
    ]
    with caplog.at_level(logging.INFO):
        run("prior", config_path(run_folder, "prior"), overrides)
    [record] = [record for record in caplog.records if "[inputs]" in record.message]
    assert "decoder" in record.message


def test_the_bundle_generates_images(run_folder: Path) -> None:
    bundle = run_folder / "bundle.safetensors"
    metadata = read_metadata(bundle)
    assert set(metadata["parts"]) == {"prior", "decoder", "vqgan", "image_encoder", "text_encoder"}
    assert set(metadata["training"]) == {*STAGES, *(f"{stage}_again" for stage in build.AGAIN)}
    assert metadata["training"]["prior"]["step"] == 4
    assert "apple" in metadata["vocabulary"]["words"] and "Apache" in metadata["licence"]
    pipe = WuerstchenPipeline.load(bundle, device="cpu", dtype="fp32")
    assert all(getattr(pipe, part) is not None for part in PARTS_OF["v2"])
    assert pipe.prior_text_encoder is pipe.decoder_text_encoder
    assert pipe.sampling == SamplingSettings().updated(
        width=256, height=256, schedule="fast", decoder_steps=1, prior_guidance=3.0
    )
    for stage, network in (("prior", pipe.prior), ("decoder", pipe.decoder)):  # from the second training
        first, trained = (
            load_file(folder / stage / f"{stage}.safetensors") for folder in (run_folder, run_folder / "again")
        )
        state = {f"{stage}.{key}": x for key, x in network.state_dict().items()}
        assert all(torch.equal(x, trained[key].bfloat16().float()) for key, x in state.items())
        assert any(not torch.equal(x, first[key]) for key, x in trained.items())
    assert pipe.prior is not None
    for kind in RECIPES:
        file = f"bundle-{kind}.safetensors"
        check_control(load_control_net(run_folder / file).params, pipe.prior.params, file)
    [image] = pipe.generate("a banana on a red background", width=128, height=64, prior_steps=2, decoder_steps=2)
    assert image.size == (128, 64) and np.asarray(image).std() > 0


def test_the_v1_bundle_generates_images(run_folder: Path) -> None:
    bundle = run_folder / "v1" / "bundle.safetensors"
    metadata = read_metadata(bundle)
    assert set(metadata["parts"]) == {"prior", "token_decoder", "vqgan", "image_encoder", "text_encoder"}
    assert set(metadata["training"]) == {"vqgan", "encoder", "text", "token-decoder", "prior"}
    assert metadata["version"] == "v1" and "apple" in metadata["vocabulary"]["words"]
    assert any(x.dtype == FP8 for x in load_file(bundle).values())
    pipe = WuerstchenPipeline.load(bundle, device="cpu", dtype="fp32")
    assert pipe.version == "v1" and all(getattr(pipe, part) is not None for part in PARTS_OF["v1"])
    [image] = pipe.generate("a banana on a red background", width=128, height=64, prior_steps=2, decoder_steps=2)
    assert image.size == (128, 64) and np.asarray(image).std() > 0


def test_v1_features_are_the_latents_of_v2s_prior(run_folder: Path) -> None:
    """Only the encoder's last layer differs; compared before rounding to fp8."""
    of_v2 = read_part(run_folder / "bundle.safetensors", "image_encoder")
    encoders: list[ImageEncoder] = []
    for part in (of_v2, build_v1.in_v1_units(of_v2)):
        encoder = ImageEncoder(part.params).eval()
        encoder.load_state_dict({key: x.double() if x.is_floating_point() else x for key, x in part.state_dict.items()})
        encoders.append(encoder.double())
    pixels = torch.rand(1, 3, 96, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before, after = (encoder(pixels) for encoder in encoders)
    torch.testing.assert_close(after, (before + 1) / 42, rtol=0, atol=1e-9)
    assert after.std() > 0


def test_the_v1_recipe_refuses_a_run_folder_of_another_v2_model(run_folder: Path, tmp_path: Path) -> None:
    bundle, other = run_folder / "bundle.safetensors", tmp_path / "other.safetensors"
    for _ in range(2):
        build_v1.copy_from_v2(tmp_path / "run", bundle)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*.safetensors")}
    other.write_bytes(bundle.read_bytes() + b" ")
    with pytest.raises(ValueError, match=r"run .*other\.safetensors.*--run"):
        build_v1.copy_from_v2(tmp_path / "run", other)
    assert len(before) == 3 and all(path.read_bytes() == content for path, content in before.items())


def test_an_unfinished_run_cannot_be_bundled(run_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"prior\.safetensors .*prior"):
        build.assemble(tmp_path, tmp_path / "bundle.safetensors")
    (tmp_path / "log.jsonl").touch()
    with pytest.raises(ValueError, match=r"log\.jsonl"):
        build.last_step(tmp_path)


def test_assemble_only_trains_nothing_and_copies_logs_for_the_shipped_model_alone(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "again.safetensors"
    monkeypatch.setattr(build, "RECIPE", tmp_path)
    monkeypatch.setattr(build, "LOGS", tmp_path / "logs")
    shutil.copy(run_folder / "prior_again.toml", tmp_path)
    build.main(["--run", str(run_folder), "--output", str(target), "--assemble-only"])
    assert target.read_bytes() == (run_folder / "bundle.safetensors").read_bytes()
    assert not (tmp_path / "logs").exists()
    monkeypatch.setattr(build, "demo_path", lambda: target)
    build.main(["--run", str(run_folder), "--output", str(target), "--assemble-only"])
    for name, folder in build.stage_folders(run_folder).items():
        assert read_log(folder) == build.read_log(tmp_path / "logs" / f"{name}.jsonl")


def test_a_bundle_trains_further_and_keeps_its_own_logs_and_image_encoder(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped, logs = tmp_path / "shipped.safetensors", tmp_path / "logs"
    shutil.copy(run_folder / "bundle.safetensors", shipped)
    build.copy_logs(build.stage_folders(run_folder), logs)
    for name, value in {"RECIPE": run_folder, "LOGS": logs, "demo_path": lambda: shipped}.items():
        monkeypatch.setattr(build, name, value)
    before = read_part(shipped, "image_encoder").state_dict
    for _ in range(2):  # the second time, everything is trained already
        build.main(["--run", str(tmp_path / "run"), "--output", str(shipped), "--start", str(shipped)])
        training = read_metadata(shipped)["training"]
        assert {name: row["step"] for name, row in training.items()} == {
            **dict.fromkeys(STAGES, 8),
            "encoder": 4,
            **{f"{stage}_again": 4 for stage in build.AGAIN},
        }
        assert {path.stem for path in logs.glob("*.jsonl")} == {*training}
        assert [row["step"] for row in build.joined_log(logs, "prior")] == [2, 4, 6, 8, 10, 12]
    after = read_part(shipped, "image_encoder").state_dict
    assert all(torch.equal(x, after[key]) for key, x in before.items())
    first, second = (read_part(file, "vqgan").state_dict for file in (run_folder / "bundle.safetensors", shipped))
    assert not all(torch.equal(x, second[key]) for key, x in first.items())


@pytest.mark.parametrize("included", [True, False])
def test_samples_need_the_text_encoder_of_the_decoder(
    run_folder: Path, inputs: list[str], tmp_path: Path, included: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """As in v2, whose decoder reads CLIP-H and whose prior reads CLIP-bigG."""
    params = read_part(run_folder / "decoder" / "decoder.safetensors", "decoder").params
    parts = {"decoder": Decoder(replace(params, clip_embd=32)), "decoder_text_encoder": TextEncoder(TEXT)}
    save_bundle(tmp_path / "b.safetensors", {name: parts[name] for name in list(parts)[: 1 + included]}, {})
    changes = [*inputs, f"run='{tmp_path}'", f"inputs.decoder='{tmp_path / 'b.safetensors'}'", "train.steps=2"]
    with caplog.at_level(logging.WARNING):
        run("prior", config_path(run_folder, "prior"), changes)
    assert (tmp_path / "prior" / "sheet-000002.png").exists() == included
    warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert any("b.safetensors" in text for text in warnings) == (not included)
