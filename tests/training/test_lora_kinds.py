"""Adapters of every kind: the files that are written of them, read by this package, peft and diffusers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.golden_data import assert_near
from helpers.lora_training import TOKENS, write_config
from helpers.networks import DECODER, NETWORKS, TEXT
from helpers.tiny_model import write_tiny_bundle
from helpers.tiny_stages import assert_equal_states
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from wuerstchen_core import WuerstchenPipeline
from wuerstchen_core.checkpoints.lora_files import read_lora
from wuerstchen_core.checkpoints.lora_merge import LoraStack
from wuerstchen_core.common.dataclass_config import from_table
from wuerstchen_core.models.attention import split_projections
from wuerstchen_core.models.text_encoder import TextEncoder
from wuerstchen_core.training.run import run
from wuerstchen_core.training.stages.adapters import AdapterConfig, attach
from wuerstchen_core.training.stages.lora_output import DIFFUSERS_FILE, load_adapters, write_lora
from wuerstchen_core.training.stages.text_tower import attach_text_encoder

peft = pytest.importorskip("peft", reason="LoRAs are trained with peft")

BASE = AdapterConfig(2, 3.0, ("to_q", "to_out.0", "kv_mapper.1"), ("q_proj", "fc1"))
KINDS = {
    "lora": BASE,
    "rslora": replace(BASE, rslora=True, init="gaussian"),
    "patterns": replace(BASE, alpha=0.0, rank_pattern={r"\d+\.attention\.to_q": 4}, alpha_pattern={"fc1|to_q": 8.0}),
    "dora": replace(BASE, kind="dora", rank_pattern={"to_q": 4}),
    "loha": replace(BASE, kind="loha", rank_pattern={"to_q": 4}),
    "lokr": replace(BASE, kind="lokr", init="lycoris", rank_pattern={"to_q": 4}),
    "lokr of whole factors": replace(BASE, kind="lokr", rank=40, alpha=40.0, factor=4),
    "convolutions": replace(BASE, alpha=0.5, targets=("to_q", "projection", "out.1")),
    "dora of convolutions": replace(BASE, alpha=0.5, kind="dora", targets=("to_q", "projection", "out.1")),
    "loha of convolutions": replace(BASE, kind="loha", targets=("depthwise", "projection")),
}
STRIDED = replace(BASE, kind="dora", targets=("to_q", "embedding.1", "down_blocks.1.0.1"))  # also a convolution of 2x2
ALL_KINDS = {**KINDS, "strided": STRIDED, "lokr of 3x3": replace(BASE, kind="lokr", targets=("to_q", "depthwise"))}
PARTS = {
    "prior": tuple(KINDS),
    "decoder": ("patterns", "dora", "lokr", "strided", "lokr of 3x3"),
    "token_decoder": ("lora", "strided"),
}
TOWERS = {"prior": "prior_text_encoder", "decoder": "decoder_text_encoder", "token_decoder": "decoder_text_encoder"}
Outputs = tuple[Tensor, Tensor]


def networks(part: str) -> dict[str, Any]:
    """Returns a network and its text encoder by part."""
    return deepcopy(_networks(part))


@cache
def _networks(part: str) -> dict[str, Any]:
    torch.manual_seed(1)
    tower = TextEncoder(TEXT if part == "prior" else replace(TEXT, width=DECODER.clip_embd))
    tower.init_weights()
    return {part: NETWORKS[part].perturbed(), TOWERS[part]: tower.eval()}


@torch.no_grad()
def outputs(part: str, found: Mapping[str, nn.Module]) -> Outputs:
    return found[part](*NETWORKS[part].inputs()), found[TOWERS[part]](*TOKENS)


def adapted(part: str, config: AdapterConfig) -> tuple[nn.Module, Any]:
    """Returns a network and its text encoder with adapters of this configuration, and their layers."""
    found = networks(part)
    split_projections(found[part])
    attach_text_encoder(found[part], found[TOWERS[part]])
    return found[part], attach(found[part], config)


def trained(part: str, config: AdapterConfig) -> tuple[nn.Module, Any]:
    """Returns `adapted` with random values, as if they had been trained."""
    net, layers = adapted(part, config)
    draw = torch.Generator().manual_seed(3)
    state = {key: x + 0.1 * torch.randn(x.shape, generator=draw) for key, x in net.state_dict().items()}
    net.load_state_dict(state)
    return net, layers


@pytest.fixture(scope="module", params=[(part, kind) for part, kinds in PARTS.items() for kind in kinds], ids=str)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, Path, Outputs]:
    """The part, the kind, the file and the outputs before saving."""
    part, kind = request.param
    file = tmp_path_factory.mktemp("kind") / "lora.safetensors"
    net, layers = trained(part, ALL_KINDS[kind])
    write_lora(file, net, ALL_KINDS[kind], layers, {"training": {"step": 3}}, part)
    return part, kind, file, outputs(part, {part: net, TOWERS[part]: net.get_submodule("text_encoder")})


def test_new_adapters_have_no_effect(saved: tuple[str, str, Path, Outputs]) -> None:
    part, kind, _, trained_outputs = saved
    net, _ = adapted(part, ALL_KINDS[kind])
    found = outputs(part, {part: net, TOWERS[part]: net.get_submodule("text_encoder")})
    plain = outputs(part, networks(part))
    for one, base, after in zip(found, plain, trained_outputs, strict=True):
        assert_near(one, base, 1e-5)
        assert (after - base).abs().max() > 0.01


def test_our_loader_gives_the_same_outputs(saved: tuple[str, str, Path, Outputs]) -> None:
    part, _, file, expected = saved
    found = networks(part)
    LoraStack().add(found, file)
    for one, other in zip(outputs(part, found), expected, strict=True):
        assert_near(one, other, 2e-5)
    with safe_open(file, "pt") as header:
        release = "v1-decoder" if part == "token_decoder" else f"v2-{part}"
        assert header.metadata()["modelspec.architecture"] == f"wuerstchen-{release}/lora"


def test_peft_gives_the_same_output(saved: tuple[str, str, Path, Outputs]) -> None:
    part, kind, file, (expected, _) = saved
    folder = file.with_name("peft")
    others = part == "decoder" or (part == "prior" and ALL_KINDS[kind].kind in ("loha", "lokr"))
    assert folder.exists() == others
    if folder.exists():
        model = peft.PeftModel.from_pretrained(networks(part)[part], folder).eval()
        with torch.no_grad():
            assert_near(model(*NETWORKS[part].inputs()), expected, 2e-5)
        assert len(read_lora(folder).network) == len(read_lora(file).network)


def test_diffusers_gives_the_same_output(saved: tuple[str, str, Path, Outputs]) -> None:
    diffusers = pytest.importorskip("diffusers.pipelines.deprecated.wuerstchen")
    part, kind, file, (expected, _) = saved
    if not file.with_name(DIFFUSERS_FILE).exists():
        pytest.skip("diffusers has no such adapters")
    ours = networks(part)[part]
    sizes = {name: getattr(ours.params, name) for name in ("c", "c_cond", "depth", "nhead", "c_r")}
    theirs = diffusers.WuerstchenPrior(**sizes, dropout=0.0)
    theirs.load_state_dict(ours.state_dict())
    state = {key.removeprefix("prior."): x for key, x in load_file(file.with_name(DIFFUSERS_FILE)).items()}
    theirs.load_lora_adapter({key: x for key, x in state.items() if not key.startswith("text")}, prefix=None)
    with torch.no_grad():
        assert_near(theirs.eval()(*NETWORKS[part].inputs()), expected, 2e-5)


def test_training_goes_on_from_a_file(saved: tuple[str, str, Path, Outputs]) -> None:
    """The factors may differ, since alpha is in the file's tensors; the outputs do not."""
    part, kind, file, expected = saved
    config = replace(ALL_KINDS[kind], alpha=5.0) if part == "prior" else ALL_KINDS[kind]
    net, layers = adapted(part, config)
    load_adapters(net, replace(config, start=str(file)), layers)
    found = outputs(part, {part: net, TOWERS[part]: net.get_submodule("text_encoder")})
    for one, other in zip(found, expected, strict=True):
        assert_near(one, other, 2e-5)


def test_training_goes_on_from_kohyas_names_with_alpha(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(4)
    path = "blocks.2.attention.to_q"
    up, down = torch.randn(64, 2, generator=draw), torch.randn(2, 64, generator=draw)
    flat = f"lora_unet_{path.replace('.', '_')}"
    tensors = {f"{flat}.lora_up.weight": up, f"{flat}.lora_down.weight": down, f"{flat}.alpha": torch.tensor(1.0)}
    save_file(tensors, tmp_path / "kohya.safetensors")
    config = AdapterConfig(2, 4.0, start=str(tmp_path / "kohya.safetensors"))
    net = NETWORKS["prior"].perturbed()
    layers = attach(net, config)
    untouched = net.state_dict()["blocks.5.attention.to_v.lora_A.default.weight"].clone()
    load_adapters(net, config, layers)
    state = net.state_dict()
    change = state[f"{path}.lora_B.default.weight"] @ state[f"{path}.lora_A.default.weight"] * (4.0 / 2)
    assert_near(change, up @ down * (1.0 / 2), 1e-5)
    assert torch.equal(state["blocks.5.attention.to_v.lora_A.default.weight"], untouched)


UNFITTING = {
    "rank": (BASE, replace(BASE, rank=3), "rank 2; here it is 3"),
    "kind": (BASE, replace(BASE, kind="dora"), "no dora"),
    "another kind": (KINDS["loha"], BASE, "hada_w1_a.* no lora"),
    "targets": (BASE, replace(BASE, targets=("to_q",)), "targets"),
    "no text": (BASE, replace(BASE, text_targets=()), "text_targets"),
    "factor": (KINDS["lokr of whole factors"], replace(BASE, kind="lokr", rank=40, factor=8), "factor"),
}


@pytest.mark.parametrize("name", UNFITTING)
def test_a_file_that_does_not_fit_is_refused(name: str, tmp_path: Path) -> None:
    before, config, facts = UNFITTING[name]
    file = tmp_path / "old.safetensors"
    write_lora(file, *_swapped(before))
    net, layers = adapted("prior", config)
    with pytest.raises(ValueError, match=rf"old\.safetensors.*{facts}") as error:
        load_adapters(net, replace(config, start=str(file)), layers)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def _swapped(config: AdapterConfig) -> tuple[nn.Module, AdapterConfig, Any, dict[str, Any]]:
    net, layers = trained("prior", config)
    return net, config, layers, {}


def test_a_folder_for_peft_states_ranks_by_layer(tmp_path: Path) -> None:
    config = replace(BASE, kind="loha", rank_pattern={"to_q": 4})
    net, layers = trained("prior", config)
    write_lora(tmp_path / "lora.safetensors", net, config, layers, {})
    stated = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (stated["peft_type"], stated["r"], stated["alpha"]) == ("LOHA", 2, 2)
    assert set(stated["rank_pattern"].values()) == set(stated["alpha_pattern"].values()) == {4}


MISTAKES = {
    "kind": ({"kind": "oft"}, "kind .*lora, dora, loha, lokr"),
    "dropout": ({"kind": "loha", "dropout": 0.1}, "dropout .*loha"),
    "rslora": ({"kind": "lokr", "rslora": True}, "rslora .*lokr"),
    "init": ({"init": "lycoris"}, "init .*lora"),
    "init of lokr": ({"kind": "lokr", "init": "gaussian"}, "init .*lokr"),
    "factor": ({"factor": 4}, "factor .*lora"),
    "ranks": ({"rank_pattern": {"to_q": 0}}, "rank_pattern .*whole numbers"),
    "alphas": ({"alpha_pattern": {"to_q": "high"}}, "alpha_pattern .*numbers"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named(name: str) -> None:
    table, facts = MISTAKES[name]
    with pytest.raises(ValueError, match=rf"\[lora\] {facts}"):
        from_table(AdapterConfig, table, "lora")


@pytest.mark.parametrize("stage", ["lora", "decoder-lora", "token-decoder-lora"])
def test_a_run_goes_on_from_the_file_of_another(stage: str, bundle: Path, tmp_path: Path) -> None:
    """Its first steps at a tiny rate change almost nothing; without `start` the file would be without effect."""
    pytest.importorskip("resvg_py", reason="drawing needs resvg-py")
    if stage == "token-decoder-lora":
        bundle = write_tiny_bundle(tmp_path / "v1.safetensors", release="v1")
    config = write_config(tmp_path, bundle)
    changes = ["lora.kind='lokr'", "lora.dropout=0.0", "train.steps=2", "train.sheet_every=2"]
    if stage != "lora":
        changes += ["lora.text_targets=['q_proj']"]
    first = run(stage, config, [f"run='{tmp_path / 'one'}'", *changes])
    rate = ["train.lr=1e-9", "train.weight_decay=0.0", f"lora.start='{first}'"]
    second = run(stage, config, [f"run='{tmp_path / 'two'}'", *changes, *rate])
    one, two = load_file(first), load_file(second)
    assert one.keys() == two.keys() and (first.parent / "sheet-000002.png").exists()
    assert all(torch.allclose(x, two[key], atol=1e-6) for key, x in one.items())
    base, changed = (WuerstchenPipeline.load(bundle, device="cpu", dtype="fp32", **x) for x in ({}, {"lora": second}))
    part = "prior" if stage == "lora" else stage.removesuffix("-lora").replace("-", "_")
    for name in (part, TOWERS[part]):
        before, after = (getattr(x, name).state_dict() for x in (base, changed))
        assert any(not torch.equal(x, after[key]) for key, x in before.items())
    other = "decoder_text_encoder" if part == "prior" else "prior_text_encoder"
    assert_equal_states(*(getattr(x, other).state_dict() for x in (base, changed)))


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        ({"rank_pattern": {"to_k": 2}}, "rank_pattern: no target matches 'to_k'"),
        ({"alpha_pattern": {"to_q(": 2.0}}, r"alpha_pattern .*invalid .*'to_q\('"),
        ({"init": "orthogonal", "rank": 3}, "peft .*even"),
        ({"targets": ("depthwise",), "rank": 64}, ".*depthwise.*loha"),
    ],
)
def test_a_pattern_or_rank_that_does_not_fit_is_named(change: dict[str, Any], facts: str) -> None:
    with pytest.raises(ValueError, match=rf"\[lora\] {facts}"):
        adapted("prior", replace(BASE, **change))
