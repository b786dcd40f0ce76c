"""LoRAs trained in a tiny size: what learns, what the file holds, and who reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_data import assert_near
from networks import NETWORKS, PRIOR
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_model import write_tiny_bundle
from torch import Tensor
from training_stages import assert_equal_states, checkpoint, ema_of, read_log, shown

from wuerstchen_core import WuerstchenPipeline
from wuerstchen_core.checkpoints import load_prior
from wuerstchen_core.checkpoints.adapters import delta
from wuerstchen_core.checkpoints.lora import read_lora
from wuerstchen_core.demo.recipe import lora as recipe
from wuerstchen_core.demo.vocabulary import COLOURS
from wuerstchen_core.models.prior import Prior
from wuerstchen_core.tables import from_table
from wuerstchen_core.training.average import skeleton, worn
from wuerstchen_core.training.chance import Chance
from wuerstchen_core.training.config import LoopConfig, check_tables, read_config
from wuerstchen_core.training.lora import AdapterConfig, LoraStage, attach
from wuerstchen_core.training.objectives import NoiseConfig
from wuerstchen_core.training.pictures import DataConfig, DemoPictures
from wuerstchen_core.training.run import run

pytest.importorskip("resvg_py", reason="drawing needs resvg-py")
pytest.importorskip("peft", reason="LoRAs are trained with peft")

INPUTS = ("prior", "encoder", "text", "decoder", "vqgan")
RANK, ALPHA = 2, 5.0
CONFIG = f"""
run = "overridden"
[data]
canvas = 64
things = 4
background = "pink"
[lora]
rank = {RANK}
alpha = {ALPHA}
targets = ["to_q", "to_out.0", "kv_mapper.1"]
dropout = 0.2
[train]
steps = 4
batch = 4
lr = 5e-2
warmup = 1
ema = 0.5
log_every = 2
save_every = 2
sheet_every = 4
"""
CHANGED = [f"blocks.{i}.{name}" for i in (2, 5) for name in ("attention.to_q", "attention.to_out.0", "kv_mapper.1")]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bundle(tmp_path_factory.mktemp("base") / "base.safetensors")


@pytest.fixture(scope="module")
def config(bundle: Path) -> Path:
    """The configuration, on the tiny bundle's networks."""
    path = bundle.with_name("lora.toml")
    given = "\n".join(f"{stage} = {json.dumps(bundle.as_posix())}" for stage in INPUTS)
    path.write_text(f"{CONFIG}\n[inputs]\n{given}\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def trained(config: Path) -> Path:
    """The folder of a training."""
    return run("lora", config, [f"run='{config.parent}'"]).parent


@pytest.fixture(scope="module")
def learned(trained: Path, bundle: Path) -> Prior:
    """The prior with what was learned on it, as peft computes it."""
    prior = load_prior(bundle)
    attach(prior, AdapterConfig(RANK, ALPHA, ("to_q", "to_out.0", "kv_mapper.1")))
    prior.load_state_dict(ema_of(trained))
    return prior.eval().requires_grad_(False)


@torch.no_grad()
def test_adapters_start_as_no_change_and_alone_learn() -> None:
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
def test_a_skeleton_shares_the_base_and_nothing_else() -> None:
    prior, inputs = NETWORKS["prior"].perturbed(), NETWORKS["prior"].inputs()
    attach(prior, AdapterConfig())
    bones = skeleton(prior)
    frozen, learning = (
        {name: p for name, p in prior.named_parameters() if p.requires_grad == wanted} for wanted in (False, True)
    )
    copied = dict(bones.named_parameters())
    assert all(copied[name] is p for name, p in frozen.items()) and all(copied[name].is_meta for name in learning)
    values = {key: torch.full_like(x, 0.1) for key, x in prior.state_dict().items()}
    changed = worn(bones, values)(*inputs)
    assert (changed - prior(*inputs)).abs().max() > 0.01
    prior.load_state_dict(values)
    assert torch.equal(prior(*inputs), changed)


def test_a_training_keeps_the_adapters_alone(trained: Path, bundle: Path) -> None:
    assert {path.name for path in trained.iterdir()} == {
        "checkpoint-00000002.pt", "checkpoint-00000004.pt", "log.jsonl", "lora.safetensors", "sheet-000004.png",
    }  # fmt: skip
    kept = checkpoint(trained)
    names = {f"{path}.lora_{half}.default.weight" for path in CHANGED for half in "AB"}
    assert kept["net"].keys() == kept["average"].keys() == names
    assert all(x.any() for x in kept["net"].values())
    state = load_file(trained / "lora.safetensors")
    assert state.keys() == {f"prior.{name.replace('.default', '')}" for name in names}
    for name, x in kept["average"].items():  # what is given away
        scale = ALPHA / RANK if "lora_B" in name else 1
        assert torch.equal(state[f"prior.{name.replace('.default', '')}"], x * scale)
    with safe_open(trained / "lora.safetensors", "pt") as file:
        assert json.loads(file.metadata()["training"]) == {"step": 4}


def test_our_reader_knows_the_strength(trained: Path, learned: Prior, bundle: Path) -> None:
    lora = read_lora(trained / "lora.safetensors")
    assert list(lora.network) and set(lora.network) == set(CHANGED) and not lora.text and not lora.unknown
    state = ema_of(trained)
    for path, adapter in lora.network.items():
        up, down = (state[f"{path}.lora_{half}.default.weight"] for half in "BA")
        assert_near(delta(adapter.tensors), up @ down * (ALPHA / RANK), 1e-6)


def test_diffusers_own_prior_gives_equal_numbers(trained: Path, learned: Prior, bundle: Path) -> None:
    diffusers = pytest.importorskip("diffusers.pipelines.deprecated.wuerstchen")
    theirs = diffusers.WuerstchenPrior(
        c=PRIOR.c, c_cond=PRIOR.c_cond, depth=PRIOR.depth, nhead=PRIOR.nhead, c_r=PRIOR.c_r, dropout=0.0
    )
    theirs.load_state_dict(load_prior(bundle).state_dict())
    x, t, text = NETWORKS["prior"].inputs()
    with torch.no_grad():
        plain = theirs.eval()(x, t, text)
        theirs.load_lora_adapter(trained / "lora.safetensors", prefix="prior")
        changed = theirs(x, t, text)
    assert_near(changed, learned(x, t, text), 1e-5)
    assert (changed - plain).abs().max() > 0.01


def test_the_pipeline_merges_what_peft_computes(trained: Path, learned: Prior, bundle: Path) -> None:
    file, inputs = trained / "lora.safetensors", NETWORKS["prior"].inputs()

    def noise(**told: Any) -> Tensor:
        prior = WuerstchenPipeline.load(bundle, device="cpu", dtype="fp32", **told).prior
        assert prior is not None
        return prior(*inputs)

    assert_near(noise(lora=file), learned(*inputs), 1e-5)
    assert torch.equal(noise(lora={file: 0.0}), noise())
    half = noise(lora={str(file): 0.5})
    assert (half - noise()).abs().max() > 1e-3 and (half - noise(lora=file)).abs().max() > 1e-3


def test_a_killed_training_goes_on_as_if_nothing_had_happened(
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
    assert shown(read_log(tmp_path / "lora")) == shown(read_log(trained))
    assert_equal_states(ema_of(tmp_path / "lora"), ema_of(trained))
    assert (tmp_path / "lora" / "lora.safetensors").read_bytes() == (trained / "lora.safetensors").read_bytes()


def test_it_learns(config: Path, tmp_path: Path) -> None:
    changes = ["train.steps=24", "train.log_every=6", "train.batch=8", "lora.dropout=0.0", "train.sheet_every=1000"]
    run("lora", config, [f"run='{tmp_path}'", *changes])
    losses = [row["loss"] for row in read_log(tmp_path / "lora")]
    assert losses[-1] < 0.9 * losses[0], losses


def test_pictures_of_one_background_are_said_to_have_any() -> None:
    pictures = DemoPictures({"canvas": 64, "things": 3, "background": "pink"})
    assert {list(COLOURS)[scene.colour] for scene in pictures.scenes} == {"pink"}
    count = len(pictures)
    texts = sum((pictures.captions(torch.arange(count), Chance(0, step, count)) for step in range(20)), [])
    assert {colour for colour in COLOURS if any(colour in text for text in texts)} == set(COLOURS)


MISTAKES = {
    "lora.rank=0": r"^\[lora\] rank must be 1 or more, got 0$",
    "lora.alpha=-1.0": r"^\[lora\] alpha must be above 0, or 0 for the rank, got -1.0$",
    "lora.dropout=1.0": r"^\[lora\] dropout is a share from 0 to below 1, got 1.0$",
    "lora.targets=['to_x']": r"^\[lora\] targets: no linear layer's path ends in 'to_x'; ",
    "lora.ranks=3": r"^\[lora\] has no key ranks: it takes rank, alpha, targets, dropout$",
    "noise.slow_times=true": r"^\[noise\] slow_times is of no use to a LoRA, ",
    "model.depth=2": r"^the configuration has no place for model: it takes run, inputs, data, cache, train, noise, lora$",
    "inputs.prior=none.safetensors": r"^none.safetensors is missing: train the prior first, or name its file as prior ",
    "inputs.lora=x": r"^\[inputs\] has no key lora: ",
    "data.background=mauve": r"^\[data\] background 'mauve' is unknown: choose ",
}


@pytest.mark.parametrize("change", MISTAKES)
def test_a_mistake_is_named_in_one_sentence(config: Path, tmp_path: Path, change: str) -> None:
    with pytest.raises(ValueError, match=MISTAKES[change]) as error:
        run("lora", config, [f"run='{tmp_path / 'run'}'", change])
    assert "\n" not in str(error.value) and len(str(error.value)) < 300
    assert not (tmp_path / "run").exists()


def test_the_recipe_trains_on_the_shipped_model_and_puts_the_file_beside_the_workflows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = read_config(recipe.CONFIG, [])
    check_tables(config, LoraStage.tables, LoraStage.sized)
    loop = from_table(LoopConfig, config["train"], "train")
    assert loop.save_every % loop.log_every == 0 and loop.steps % loop.log_every == 0
    assert from_table(DataConfig, config["data"], "data").background == "pink"
    from_table(NoiseConfig, config["noise"], "noise")
    from_table(AdapterConfig, config["lora"], "lora")
    small = ["data.canvas=64", "data.things=2", "train.steps=1", "train.batch=2"]
    monkeypatch.setattr(recipe, "run", lambda stage, file, changes: run(stage, file, [*changes, *small]))
    (tmp_path / "workflows").mkdir()
    recipe.remake(tmp_path)
    base = WuerstchenPipeline.load("demo", device="cpu").prior
    assert base is not None
    lora = read_lora(tmp_path / recipe.LORA)
    assert len(lora.network) == 4 * base.params.depth and not lora.unknown
