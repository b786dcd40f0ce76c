"""All trainers in a tiny size, one after the other, until the bundles paint."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from training_stages import (
    ALL,
    STAGES,
    assert_equal_states,
    checkpoint,
    config_of,
    ema_of,
    launch,
    read_log,
    shown,
    write_configs,
)

from wuerstchen_core import WuerstchenPipeline
from wuerstchen_core.bench.peer import network_class
from wuerstchen_core.checkpoints import PARTS_OF, read_metadata, read_part, save_bundle
from wuerstchen_core.checkpoints.components import component_key
from wuerstchen_core.checkpoints.precision import FP8
from wuerstchen_core.cli import main
from wuerstchen_core.demo.recipe import build, build_v1
from wuerstchen_core.models.image_encoder import ImageEncoder
from wuerstchen_core.training.chance import Chance
from wuerstchen_core.training.pictures import DemoPictures, sheet
from wuerstchen_core.training.run import STAGES as TRAINERS
from wuerstchen_core.training.run import run
from wuerstchen_core.training.saved import checkpoints
from wuerstchen_core.training.token_decoder import code_features

pytest.importorskip("resvg_py", reason="drawing needs resvg-py")

ROOT = Path(__file__).parents[1]
DATA = {"data": {"canvas": 64, "things": 2}}
TILE = 128  # pixels of a sheet
DIFFUSERS = ("vqgan", "decoder", "prior")  # stages whose networks it has
ROWS = {"vqgan": 3, "encoder": 2, "text": 2, "decoder": 2, "token-decoder": 2, "prior": 2}  # of a sheet of 8 pictures


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe's one command over tiny configurations; `bundle.safetensors` beside the stages."""
    folder = tmp_path_factory.mktemp("run")
    write_configs(folder, Path("overridden"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "RECIPE", folder)
        build.main(["--run", str(folder), "--output", str(folder / "bundle.safetensors")])
        patch.setattr(build_v1, "RECIPE", folder)
        patch.setattr(build_v1, "demo_path", lambda name="demo": folder / "bundle.safetensors")
        build_v1.main(["--run", str(folder / "v1"), "--output", str(folder / "v1" / "bundle.safetensors")])
    return folder


def trained(run_folder: Path, stage: str) -> Path:
    """The folder of a stage."""
    return (run_folder if stage in STAGES else run_folder / "v1") / stage


def inputs_of(run: Path, but: str = "") -> list[str]:
    """Overrides with which a stage in another folder takes the networks of a run, all but one's."""
    files = {stage: run / stage / f"{stage}.safetensors" for stage in ALL if stage != but}
    return [f"inputs.{stage}='{file}'" for stage, file in files.items() if file.exists()]


@pytest.fixture
def inputs(run_folder: Path) -> list[str]:
    return inputs_of(run_folder)


def stage_class(stage: str) -> Any:
    return getattr(importlib.import_module(f"wuerstchen_core.training.{stage.replace('-', '_')}"), TRAINERS[stage])


@pytest.mark.parametrize("stage", ALL)
def test_a_stage_leaves_weights_log_and_sheet(run_folder: Path, stage: str) -> None:
    folder = trained(run_folder, stage)
    assert {path.name for path in folder.iterdir()} == {
        "checkpoint-00000002.pt", "checkpoint-00000004.pt", "log.jsonl", f"{stage}.safetensors", "sheet-000004.png",
        *(["diffusers"] if stage in DIFFUSERS else []),
    }  # fmt: skip
    rows = read_log(folder)
    assert [row["step"] for row in rows] == [2, 4]
    assert all(np.isfinite(row["loss"]) and row["loss"] > 0 for row in rows)
    weights = load_file(folder / f"{stage}.safetensors")
    assert weights and all(x.isfinite().all() for x in weights.values())
    assert read_metadata(folder / f"{stage}.safetensors")["training"] == {"step": 4}
    averaged = ema_of(folder)
    for key, value in weights.items():  # what is shipped is the moving average
        assert any(torch.equal(value, x) for k, x in averaged.items() if k.endswith(key.partition(".")[2]))


@pytest.mark.parametrize("stage", ALL)
def test_a_sheet_shows_the_truth_and_what_became_of_it(run_folder: Path, stage: str) -> None:
    with Image.open(trained(run_folder, stage) / "sheet-000004.png") as image:
        pixels = np.asarray(image)
    assert pixels.shape == (ROWS[stage] * TILE, 12 * TILE, 3)
    held = DemoPictures(DATA["data"], held=True)
    truth = np.asarray(sheet([held.view(held.spread(12))]))
    assert np.array_equal(pixels[:TILE], truth)
    columns = len(held) * TILE
    assert truth[:, :columns].std() > 10 and not pixels[:, columns:].any()
    others = pixels[TILE:, :columns].reshape(ROWS[stage] - 1, TILE, -1)
    assert all(row.std() > 0 for row in others)
    if stage == "text":  # which shows true pictures, found by their captions
        tiles = {pixels[:TILE, i : i + TILE].tobytes() for i in range(0, columns, TILE)}
        assert all(pixels[TILE:, i : i + TILE].tobytes() in tiles for i in range(0, columns, TILE))
    else:
        assert not np.array_equal(others[0], truth[:, :columns].reshape(TILE, -1))


@pytest.mark.parametrize("stage", ALL)
def test_a_stopped_stage_goes_on_as_if_it_had_never_been_stopped(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """Same log, same averages bit for bit; the prior has dropout, the VQGAN seeds its codes from chance at step 2."""
    kind, calls = stage_class(stage), []
    whole = trained(run_folder, stage)

    def stopped(self: Any, net: Any, *batch: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return loss(self, net, *batch)

    loss = kind.loss
    overrides = [f"run='{tmp_path}'", *inputs_of(whole.parent)]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(kind, "loss", stopped)
        run(stage, config_of(run_folder, stage), overrides)
    assert checkpoint(tmp_path / stage)["step"] == 2
    torch.manual_seed(5)
    assert run(stage, config_of(run_folder, stage), overrides) == tmp_path / stage / f"{stage}.safetensors"
    assert shown(read_log(tmp_path / stage)) == shown(read_log(whole))
    assert_equal_states(ema_of(tmp_path / stage), ema_of(whole))


@pytest.mark.long
@pytest.mark.parametrize("stage", ALL)
def test_two_processes_train_a_stage(run_folder: Path, tmp_path: Path, stage: str) -> None:
    """The command under torchrun, with half of each batch. Without dropout, batch norm and contrast: the same steps."""
    whole = trained(run_folder, stage)
    changes = [f"run='{tmp_path}'", *inputs_of(whole.parent), "train.batch=2"]
    config = ["--config", str(config_of(run_folder, stage)), *(f"--set={change}" for change in changes)]
    launch("-m", "wuerstchen_core", "train", stage, *config)
    assert {path.name for path in (tmp_path / stage).iterdir()} == {path.name for path in whole.iterdir()}
    assert all(x.isfinite().all() for x in ema_of(tmp_path / stage).values())
    if stage in ("decoder", "token-decoder"):
        one, two = ([row["loss"] for row in read_log(folder)] for folder in (whole, tmp_path / stage))
        assert two == pytest.approx(one, rel=1e-4)


def test_blocks_computed_again_train_the_same(run_folder: Path, tmp_path: Path, inputs: list[str]) -> None:
    run("prior", run_folder / "prior.toml", [f"run='{tmp_path}'", *inputs, "train.checkpointing=true"])
    assert shown(read_log(tmp_path / "prior")) == shown(read_log(run_folder / "prior"))
    assert_equal_states(ema_of(tmp_path / "prior"), ema_of(run_folder / "prior"))


@pytest.mark.parametrize("stage", DIFFUSERS)
def test_diffusers_reads_what_was_trained(run_folder: Path, stage: str) -> None:
    pytest.importorskip("diffusers")
    theirs = network_class(stage).from_pretrained(run_folder / stage / "diffusers" / stage)
    ours = read_part(run_folder / stage / f"{stage}.safetensors", stage)
    sizes = {name: value for name, value in asdict(ours.params).items() if name != "dropout"}  # which it has no key for
    assert asdict(read_part(run_folder / stage / "diffusers" / stage, stage).params).items() >= sizes.items()
    assert_equal_states({component_key(key): x for key, x in ours.state_dict.items()}, dict(theirs.state_dict()))


def test_a_stage_starts_from_weights(run_folder: Path, inputs: list[str], tmp_path: Path) -> None:
    """A prior of another run, with dropout that its file has none of; nothing learns at next to no rate."""
    base = tmp_path / "base.safetensors"
    part = read_part(run_folder / "prior" / "prior.safetensors", "prior")
    save_bundle(base, {"prior": replace(part, params=replace(part.params, dropout=0.0))}, {"licence": "MIT, of a base"})
    before = base.read_bytes()
    config = tmp_path / "tune.toml"
    text = (run_folder / "prior.toml").read_text("utf-8")
    model = text.index("[model]")
    config.write_text(f"start = '{base}'\n" + text[:model] + text[text.index("[noise]") :], encoding="utf-8")
    told = [f"run='{tmp_path}'", *inputs, "train.lr=1e-12", "train.muon_lr=0"]
    tuned = run("prior", config, [*told, "model.dropout=0.3"])
    assert read_part(tuned, "prior").params == replace(part.params, dropout=0.3)
    for key, x in read_part(tuned, "prior").state_dict.items():
        torch.testing.assert_close(x, part.state_dict[key], rtol=0, atol=1e-9)
    metadata = read_metadata(tuned)
    assert (metadata["licence"], metadata["base"]) == ("MIT, of a base", "base.safetensors")
    assert base.read_bytes() == before
    with pytest.raises(ValueError, match="missing"):
        run("prior", config, [*told, "model.depth=2", "run='elsewhere'"])


def test_another_seed_is_another_training(run_folder: Path, inputs: list[str], tmp_path: Path) -> None:
    run("prior", run_folder / "prior.toml", [f"run='{tmp_path}'", *inputs, "train.seed=1"])
    assert shown(read_log(tmp_path / "prior")) != shown(read_log(run_folder / "prior"))


LEARNING = {  # steps, and the share of the first loss that may be left; the text tower takes longer than a test may
    "vqgan": (16, 0.5),
    "encoder": (16, 0.7),
    "decoder": (16, 0.9),
    "token-decoder": (24, 0.97),
    "prior": (24, 0.9),
}


@pytest.mark.parametrize("stage", LEARNING)
def test_the_loss_goes_down(run_folder: Path, inputs: list[str], tmp_path: Path, stage: str) -> None:
    steps, share = LEARNING[stage]
    rows = 4
    changes = [f"train.steps={steps}", f"train.log_every={steps // rows}", "train.lr=5e-3", "train.batch=8"]
    changes += ["train.save_every=1000", "train.sheet_every=1000", "train.warmup=4", "train.muon_lr=0.0"]
    run(stage, config_of(run_folder, stage), [f"run='{tmp_path}'", *inputs, *changes])
    losses = [row["loss"] for row in read_log(tmp_path / stage)]
    assert len(losses) == rows and losses[-1] < share * losses[0], losses


def test_the_bundle_paints(run_folder: Path) -> None:
    bundle = run_folder / "bundle.safetensors"
    metadata = read_metadata(bundle)
    assert set(metadata["parts"]) == {"prior", "decoder", "vqgan", "image_encoder", "text_encoder"}
    assert set(metadata["training"]) == set(STAGES) and metadata["training"]["prior"]["step"] == 4
    assert "apple" in metadata["vocabulary"]["words"] and "Apache" in metadata["licence"]
    pipe = WuerstchenPipeline.load(bundle, device="cpu", dtype="fp32")
    assert all(getattr(pipe, part) is not None for part in PARTS_OF["v2"])
    assert pipe.prior_text_encoder is pipe.decoder_text_encoder
    assert (pipe.sampling.width, pipe.sampling.prior_steps) == (256, 20)
    trained = ema_of(run_folder / "prior")["projection.weight"]
    assert torch.equal(pipe.prior.projection.weight, trained.bfloat16().float())
    [image] = pipe.generate("a banana on a red background", width=128, height=64, prior_steps=2, decoder_steps=2)
    assert image.size == (128, 64) and np.asarray(image).std() > 0


def test_the_v1_bundle_paints(run_folder: Path) -> None:
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


def test_v1s_features_are_what_v2s_prior_works_on(run_folder: Path) -> None:
    """The same encoder but for its last layer, before fp8."""
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


def test_codes_that_are_near_start_alike() -> None:
    torch.manual_seed(0)
    codes = torch.tensor([[0.0] * 4, [0.02] * 4, [0.3] * 4, [3.0] * 4])
    products = (features := code_features(codes, 4096, 0.15)) @ features.T
    assert products.diagonal() == pytest.approx([1.0] * 4, abs=0.05)
    assert products[0, 1] > 0.95 > 0.9 > products[0, 2] > products[0, 3] + 0.1


def test_a_token_decoder_must_know_all_codes(run_folder: Path, inputs: list[str], tmp_path: Path) -> None:
    wrong = [f"run='{tmp_path}'", *inputs, "model.num_labels=17"]
    with pytest.raises(ValueError, match=r"^\[model\] num_labels is 17, but Stage A has 16 codes: give it as many$"):
        run("token-decoder", config_of(run_folder, "token-decoder"), wrong)
    with pytest.raises(ValueError, match=r"^\[codes\] width must be 0 or more, got -1.0$"):
        run("token-decoder", config_of(run_folder, "token-decoder"), [*wrong[:-1], "codes.width=-1.0"])


def test_a_bundle_of_an_unfinished_run_is_refused(run_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"prior.safetensors is missing: train the prior first$"):
        build.assemble(tmp_path, tmp_path / "bundle.safetensors")
    (tmp_path / "log.jsonl").touch()
    with pytest.raises(ValueError, match=r"log.jsonl is missing or empty: train the "):
        build.last_step(tmp_path)


def test_assembling_alone_trains_nothing_and_keeps_the_logs_of_what_ships(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "again.safetensors"
    monkeypatch.setattr(build, "RECIPE", tmp_path)
    build.main(["--run", str(run_folder), "--output", str(target), "--assemble-only"])
    assert target.read_bytes() == (run_folder / "bundle.safetensors").read_bytes()
    assert not (tmp_path / "logs").exists()
    monkeypatch.setattr(build, "demo_path", lambda: target)
    build.main(["--run", str(run_folder), "--output", str(target), "--assemble-only"])
    for stage in STAGES:
        assert read_log(run_folder / stage) == [
            json.loads(line) for line in (tmp_path / "logs" / f"{stage}.jsonl").read_text().splitlines()
        ]


def test_the_prior_shows_nothing_before_there_is_a_decoder(run_folder: Path, tmp_path: Path) -> None:
    for missing in ("decoder", "vqgan"):
        run("prior", run_folder / "prior.toml", [f"run='{tmp_path / missing}'", *inputs_of(run_folder, but=missing)])
        folder = tmp_path / missing / "prior"
        assert not list(folder.glob("*.png")) and (folder / "prior.safetensors").exists()


def test_a_killed_process_goes_on(run_folder: Path, inputs: list[str], tmp_path: Path) -> None:
    """`python -m wuerstchen_core train`, killed without warning, and started again: as one run."""
    changes = [*inputs, "train.steps=8", "train.log_every=4", "train.sheet_every=1000"]
    whole, killed = ([f"run='{tmp_path / name}'", *changes] for name in ("whole", "killed"))
    command = ["train", "text", "--config", str(run_folder / "text.toml"), *(f"--set={change}" for change in killed)]
    process = subprocess.Popen(
        [sys.executable, "-m", "wuerstchen_core", *command], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    while process.poll() is None and not checkpoints(tmp_path / "killed" / "text"):
        time.sleep(0.02)
    process.kill()
    assert "text:" in process.communicate()[1]  # the progress bar
    assert main(command) == 0
    run("text", run_folder / "text.toml", whole)
    assert shown(read_log(tmp_path / "killed" / "text")) == shown(read_log(tmp_path / "whole" / "text"))
    assert_equal_states(ema_of(tmp_path / "killed" / "text"), ema_of(tmp_path / "whole" / "text"))


def test_pictures_of_a_trial(run_folder: Path) -> None:
    trained, held = DemoPictures(DATA["data"]), DemoPictures(DATA["data"], held=True)
    assert len(trained) == 24 and len(held) == 8 and trained.images.shape[1:] == (3, 64, 64)
    assert not set(trained.scenes) & set(held.scenes) and {scene.thing for scene in trained.scenes} == {0, 1}
    assert len(set(trained.pick(Chance(0, 0, 24)).tolist())) == 24 and trained.pick(Chance(0, 0, 30)).shape == (30,)
    assert trained.captions(torch.arange(4), Chance(0, 0, 4), drop=1.0) == [""] * 4
    words = trained.captions(torch.zeros(200, dtype=torch.long), Chance(0, 0, 200), drop=0.25)
    assert 25 < words.count("") < 75 and len(set(words)) > 20
    assert held.spread(3).tolist() == [0, 2, 4] and held.spread(100).tolist() == list(range(8))


def test_crops_must_fit_the_pictures(run_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"^\[vqgan\] crop must be at most 48 pixels, which the margin leaves, got 52$"
    ):
        run("vqgan", run_folder / "vqgan.toml", [f"run='{tmp_path}'", "vqgan.crop=52"])
