"""LoRA training in a tiny size, and the file that it writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.golden_data import assert_near
from helpers.lora_training import ALPHA, CHANGED, RANK, TOKENS, write_config
from helpers.networks import NETWORKS
from helpers.picture_folders import examples, write_folder
from helpers.tiny_stages import assert_equal_states, assert_near_states, checkpoint, ema_of, launch, log_rows, read_log
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from tools.demo import lora as recipe
from wuerstchen_core import WuerstchenPipeline
from wuerstchen_core.checkpoints import read_part, save_bundle
from wuerstchen_core.checkpoints.lora_files import read_lora
from wuerstchen_core.common.dataclass_config import from_table
from wuerstchen_core.demo.vocabulary import COLOURS
from wuerstchen_core.models.prior import Prior
from wuerstchen_core.training.config import LoopConfig, check_tables, read_config
from wuerstchen_core.training.data.build_cache import make_cache
from wuerstchen_core.training.data.demo import DemoDataConfig, DemoDataset
from wuerstchen_core.training.ema import meta_copy
from wuerstchen_core.training.rng import StepRandom
from wuerstchen_core.training.run import run
from wuerstchen_core.training.stages.adapters import AdapterConfig, attach
from wuerstchen_core.training.stages.lora import LoraStage
from wuerstchen_core.training.stages.losses import NoiseConfig
from wuerstchen_core.training.stages.networks import base_metadata
from wuerstchen_core.training.stages.text_tower import attach_text_encoder

pytest.importorskip("resvg_py", reason="drawing needs resvg-py")
pytest.importorskip("peft", reason="LoRAs are trained with peft")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, bundle: Path) -> Path:
    return write_config(tmp_path_factory.mktemp("lora"), bundle)


@pytest.fixture(scope="module")
def trained(config: Path) -> Path:
    """The folder of a run."""
    return run("lora", config, [f"run='{config.parent}'"]).parent


@torch.no_grad()
def test_new_adapters_change_nothing_and_only_they_are_trained() -> None:
    prior, inputs = NETWORKS["prior"].perturbed(), NETWORKS["prior"].inputs()
    before = prior(*inputs)
    attach(prior, AdapterConfig(dropout=0.1))
    assert torch.equal(prior(*inputs), before)
    learning = {name for name, p in prior.named_parameters() if p.requires_grad}
    paths = [f"blocks.{i}.attention.{name}" for i in (2, 5) for name in ("to_q", "to_k", "to_v", "to_out.0")]
    assert learning == {f"{path}.lora_{half}.default.weight" for path in paths for half in "AB"}
    assert set(prior.state_dict()) == learning
    prior.load_state_dict({key: torch.ones_like(x) for key, x in prior.state_dict().items()})
    assert not torch.allclose(prior(*inputs), before, atol=0.1)
    with pytest.raises(RuntimeError, match="Missing key"):
        prior.load_state_dict({})


@torch.no_grad()
def test_a_meta_copy_shares_the_base_weights_only() -> None:
    prior, inputs = NETWORKS["prior"].perturbed(), NETWORKS["prior"].inputs()
    attach(prior, AdapterConfig())
    copy = meta_copy(prior)
    frozen, trained = (
        {name: p for name, p in prior.named_parameters() if p.requires_grad == flag} for flag in (False, True)
    )
    copied = dict(copy.named_parameters())
    assert all(copied[name] is p for name, p in frozen.items()) and all(copied[name].is_meta for name in trained)
    values = {key: torch.full_like(x, 0.1) for key, x in prior.state_dict().items()}
    copy.load_state_dict(values, assign=True)
    changed = copy(*inputs)
    assert (changed - prior(*inputs)).abs().max() > 0.01
    prior.load_state_dict(values)
    assert torch.equal(prior(*inputs), changed)


def test_a_run_stores_only_the_adapters(trained: Path) -> None:
    assert {path.name for path in trained.iterdir()} == {
        "checkpoint-00000002.pt", "checkpoint-00000004.pt", "config.toml", "log.jsonl", "lora.png",
        "lora.safetensors", "pytorch_lora_weights.safetensors", "reconstruction.png", "run.html",
        "sheet-000004.png", "starts.jsonl",
    }  # fmt: skip
    saved = checkpoint(trained)
    names = {f"{path}.lora_{half}.default.weight": f"{name}.lora_{half}.weight"
             for path, name in CHANGED.items() for half in "AB"}  # fmt: skip
    assert saved["net"].keys() == saved["average"].keys() == names.keys()
    assert all(x.any() for x in saved["net"].values())
    state = load_file(trained / "lora.safetensors")
    assert state.keys() == set(names.values())
    for name, x in saved["average"].items():  # the file has the EMA
        scale = ALPHA / RANK if "lora_B" in name else 1
        assert torch.equal(state[names[name]], x * scale)
    with safe_open(trained / "lora.safetensors", "pt") as file:
        assert json.loads(file.metadata()["training"]) == {"step": 4}
        header = file.metadata()
        assert (header["base"], header["licence"]) == ("tiny.safetensors", "MIT")
        assert header["modelspec.architecture"] == "wuerstchen-v2-prior/lora" and "modelspec" not in header
        assert (header["modelspec.title"], header["modelspec.trigger_phrase"]) == ("Pink", "sks apple, pink")


def test_a_lora_carries_the_licences_of_prior_and_text_encoder(config: Path, bundle: Path, tmp_path: Path) -> None:
    tower = tmp_path / "tower.safetensors"
    save_bundle(tower, {"text_encoder": read_part(bundle, "prior_text_encoder")}, {"licence": "of a tower"})
    for targets, licence in (('["fc2"]', "MIT / of a tower"), ("[]", "MIT")):
        overrides = [f"run='{tmp_path}'", f"inputs.text='{tower}'", f"lora.text_targets={targets}"]
        stage = LoraStage(read_config(config, overrides))
        assert base_metadata(stage.bases)["licence"] == licence


@torch.no_grad()
def test_an_attached_text_encoder_gives_the_same_states() -> None:
    prior, tower = (NETWORKS[name].perturbed() for name in ("prior", "text_encoder"))
    x, t, _ = NETWORKS["prior"].inputs()
    states = tower(*TOKENS)
    noise = prior(x[:2], t[:2], states)
    attach_text_encoder(prior, tower)
    assert_near(tower(*TOKENS), states, 1e-5)
    assert_near(prior(x[:2], t[:2], torch.stack(TOKENS).unsqueeze(2)), noise, 1e-5)
    assert torch.equal(prior(x[:2], t[:2], states), noise)


@torch.no_grad()
def test_samples_use_the_trained_text_encoder(config: Path, tmp_path: Path) -> None:
    stage = LoraStage(read_config(config, [f"run='{tmp_path}'"]))
    validation = stage.dataset.preview_images()
    assert validation is not None
    before = stage.samples(stage.net.eval(), validation)
    for name, p in stage.net.named_parameters():
        if "text_encoder" in name and "lora_B" in name:
            p.add_(1.0)
    after = stage.samples(stage.net, validation)
    assert before is not None and after is not None and not torch.equal(before[1], after[1])


@pytest.mark.long
def test_two_processes_with_accumulation_train_what_one_trains(config: Path, tmp_path: Path) -> None:
    one, two = ([f"run='{tmp_path / name}'", "lora.dropout=0.0"] for name in ("one", "two"))
    run("lora", config, one)
    changes = [*two, "train.batch=1", "train.accumulate=2"]
    launch(
        "-m", "wuerstchen_core", "train", "lora", "--config", str(config), *(f"--set={change}" for change in changes)
    )  # fmt: skip
    trained, apart = (ema_of(tmp_path / name / "lora") for name in ("one", "two"))
    assert_near_states(trained, apart, 2e-5)  # observed 6e-6


def test_gradient_checkpointing_trains_the_same(config: Path, trained: Path, tmp_path: Path) -> None:
    run("lora", config, [f"run='{tmp_path}'", "train.checkpointing=true"])
    assert_equal_states(ema_of(tmp_path / "lora"), ema_of(trained))


def test_a_stopped_run_resumes_exactly(
    config: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, loss = [], LoraStage.loss

    def stopped(self: LoraStage, net: Prior, *batch: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return loss(self, net, *batch)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(LoraStage, "loss", stopped)
        run("lora", config, [f"run='{tmp_path}'"])
    assert checkpoint(tmp_path / "lora")["step"] == 2
    torch.manual_seed(5)
    run("lora", config, [f"run='{tmp_path}'"])
    assert log_rows(tmp_path / "lora") == log_rows(trained)
    assert_equal_states(ema_of(tmp_path / "lora"), ema_of(trained))
    assert (tmp_path / "lora" / "lora.safetensors").read_bytes() == (trained / "lora.safetensors").read_bytes()


def test_the_loss_falls(config: Path, tmp_path: Path) -> None:
    changes = ["train.steps=24", "train.log_every=6", "train.batch=8", "lora.dropout=0.0", "train.sheet_every=1000"]
    run("lora", config, [f"run='{tmp_path}'", *changes])
    losses = [row["loss"] for row in read_log(tmp_path / "lora")]
    assert losses[-1] < 0.9 * losses[0], losses


def test_a_trained_text_encoder_ignores_cached_text_states(config: Path, tmp_path: Path) -> None:
    source = write_folder(tmp_path / "pictures", examples(range(8))).as_posix()
    overrides = [f"data={{source='{source}', size=64, multiple=64, workers=0}}", f"run='{tmp_path / 'plain'}'"]
    plain = run("lora", config, overrides)
    make_cache(config, [*overrides, f"cache={{output='{tmp_path / 'cache'}', dtype='fp32', batch=4}}"])
    cached = run("lora", config, [*overrides, f"data.source='{tmp_path / 'cache'}'", f"run='{tmp_path / 'cached'}'"])
    assert cached.read_bytes() == plain.read_bytes()


def test_the_text_encoder_can_be_trained_alone(config: Path, tmp_path: Path) -> None:
    file = run("lora", config, [f"run='{tmp_path}'", "lora.targets=[]", "train.steps=1", "train.ema=0.0"])
    state = load_file(file)
    assert state.keys() == {
        f"{x}.lora_{half}.weight" for x in CHANGED.values() if x.startswith("text") for half in "AB"
    }
    assert all(x.any() for x in state.values())


def test_captions_of_scenes_on_one_background_name_all_colours() -> None:
    dataset = DemoDataset({"canvas": 64, "things": 3, "background": "pink"})
    assert {list(COLOURS)[scene.colour] for scene in dataset.scenes} == {"pink"}
    count = len(dataset)
    texts = sum((dataset.captions(torch.arange(count), StepRandom(0, step, count)) for step in range(20)), [])
    assert {colour for colour in COLOURS if any(colour in text for text in texts)} == set(COLOURS)


MISTAKES = {  # an override, and what the error names
    "lora.rank=0": r"\[lora\] rank .* 0$",
    "lora.alpha=-1.0": r"\[lora\] alpha .*-1\.0$",
    "lora.dropout=1.0": r"\[lora\] dropout .*less than 1.* 1\.0$",
    "lora.targets=['to_x']": r"\[lora\] targets: .*'to_x'",
    "lora.text_targets=['to_q']": r"\[lora\] text_targets: .*'to_q'",
    "lora={targets=[]}": r"\[lora\] targets .*text_targets",
    "lora.ranks=3": r"\[lora\] .*ranks.*rank\?",
    "noise.slow_times=true": r"\[noise\] slow_times",
    "model.depth=2": r" model.* noise, lora",
    "inputs.prior=none.safetensors": r"none\.safetensors is missing",
    "inputs.lora=x": r"\[inputs\] .*lora",
    "data.background=mauve": r"\[data\] background .*mauve",
}


@pytest.mark.parametrize("change", MISTAKES)
def test_a_mistake_is_named_in_one_line(config: Path, tmp_path: Path, change: str) -> None:
    with pytest.raises(ValueError, match=MISTAKES[change]) as error:
        run("lora", config, [f"run='{tmp_path / 'run'}'", change])
    assert "\n" not in str(error.value) and len(str(error.value)) < 300
    assert not (tmp_path / "run").exists()


def test_the_recipe_trains_the_shipped_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = read_config(recipe.CONFIG, [])
    check_tables(config, LoraStage.tables)
    loop = from_table(LoopConfig, config["train"], "train")
    assert loop.save_every % loop.log_every == 0 and loop.steps % loop.log_every == 0
    assert from_table(DemoDataConfig, config["data"], "data").background == "pink"
    from_table(NoiseConfig, config["noise"], "noise")
    from_table(AdapterConfig, config["lora"], "lora")
    small = ["data.canvas=64", "data.things=2", "train.steps=1", "train.batch=2"]
    monkeypatch.setattr(recipe, "run", lambda stage, file, changes: run(stage, file, [*changes, *small]))
    recipe.remake(tmp_path / "lora.safetensors")
    base = WuerstchenPipeline.load("demo", device="cpu").prior
    assert base is not None
    lora = read_lora(tmp_path / "lora.safetensors")
    assert len(lora.network) == 4 * base.params.depth and not lora.unknown
