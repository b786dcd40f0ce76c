"""Tests the strengths of LoRAs against peft and diffusers: configurations beside the file or in its header."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.golden_data import assert_near
from helpers.lora_forms import ALPHA, FORMS, RANK, attention_of_prior, random_factors
from helpers.networks import NETWORKS, PRIOR, TEXT
from safetensors.torch import load_file, save_file
from torch import nn

from wuerstchen_core.checkpoints.adapters import delta, merge_lora
from wuerstchen_core.checkpoints.convert import convert
from wuerstchen_core.checkpoints.lora_files import lora_from_state, read_lora
from wuerstchen_core.checkpoints.lora_folders import is_lora
from wuerstchen_core.checkpoints.lora_info import describe_lora
from wuerstchen_core.models.prior import Prior

peft = pytest.importorskip("peft", reason="writes the files and computes the expected outputs")

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
PATTERNS = {"rank_pattern": {"to_v": 2}, "alpha_pattern": {r"blocks\.2\.attention\.to_[qk]": 3, "attention.to_k": 5}}
LORAS: dict[str, dict[str, Any]] = {
    "alpha": {"lora_alpha": 16},
    "defaults": {},
    "rslora": {"lora_alpha": 3, "use_rslora": True},
    "patterns": {"lora_alpha": 6, **PATTERNS},
    "patterns of whole paths": {"alpha_pattern": {"^blocks.2.attention.to_q": 1, "blocks.5.attention.to_out.0": 30}},
    "patterns of parts of names": {"alpha_pattern": {"_q": 1, "locks.5.attention.to_q": 2, "attention": 3}},
    "dora": {"lora_alpha": 6, "use_dora": True, "use_rslora": True, **PATTERNS},
    "bias of the layers": {"lora_alpha": 6, "bias": "lora_only"},
    "all biases": {"lora_alpha": 6, "bias": "all"},
    "all biases and whole modules": {"lora_alpha": 6, "bias": "all", "modules_to_save": ["projection", "cond_mapper"]},
    "bias of the adapters": {"lora_alpha": 6, "lora_bias": True},
    "whole modules": {"lora_alpha": 6, "modules_to_save": ["projection", "cond_mapper"]},
    "fan_in_fan_out": {"lora_alpha": 6, "fan_in_fan_out": True},
    "convolution": {"lora_alpha": 6, "target_modules": ["projection", "to_q", "channelwise.4"]},
}
LYCORIS: dict[str, dict[str, Any]] = {
    "alpha": {"alpha": 3},
    "defaults": {},
    "patterns": {"alpha": 3, "rank_pattern": {"to_v": 2}, "alpha_pattern": {"2.attention.to_.": 5}},
    "whole modules": {"alpha": 3, "modules_to_save": ["projection"]},
    "convolution": {"alpha": 3, "target_modules": ["projection", "depthwise"], "use_effective_conv2d": True},
    "flat convolution": {"alpha": 3, "target_modules": ["projection", "depthwise"]},
}
LOKRS: dict[str, dict[str, Any]] = {
    "both decomposed": {"alpha": 3, "r": 2, "decompose_both": True},
    "no rank": {"alpha": 3, "r": 40},
    "factor": {"alpha": 3, "decompose_factor": 4},
}
CONFIGS = {
    **{f"lora, {name}": (peft.LoraConfig, fields) for name, fields in LORAS.items()},
    **{f"loha, {name}": (peft.LoHaConfig, fields) for name, fields in LYCORIS.items()},
    **{f"lokr, {name}": (peft.LoKrConfig, fields) for name, fields in {**LYCORIS, **LOKRS}.items()},
}


def prior() -> Prior:
    network = NETWORKS["prior"].perturbed().requires_grad_(False)
    assert isinstance(network, Prior)
    return network


def randomise(model: nn.Module) -> nn.Module:
    """Returns a model whose trainable parameters are as if trained."""
    draw = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape, generator=draw) * 0.1
    return model.eval().requires_grad_(False)


def trained(network: nn.Module, kind: Any = peft.LoraConfig, **fields: Any) -> Any:
    return randomise(peft.get_peft_model(network, kind(**{"r": RANK, "target_modules": ATTENTION, **fields})))


def merged(folder: Path) -> Prior:
    network, lora = prior(), read_lora(folder)
    assert not lora.unknown and not lora.note
    network.load_state_dict(merge_lora(network.state_dict(), lora.network))
    return network


@pytest.mark.parametrize("name", CONFIGS)
def test_pefts_folder_counts_as_in_peft(name: str, tmp_path: Path) -> None:
    kind, fields = CONFIGS[name]
    model, inputs = trained(prior(), kind, **fields), NETWORKS["prior"].inputs()
    model.save_pretrained(tmp_path)
    # Loaded again, since peft sorts the patterns when it saves them, and takes the first that matches.
    expected = peft.PeftModel.from_pretrained(prior(), tmp_path).eval()(*inputs)
    assert (expected - prior()(*inputs)).abs().max() > 0.003
    assert_near(merged(tmp_path)(*inputs), expected, 1e-5)
    assert_near(merged(tmp_path / "adapter_model.safetensors")(*inputs), expected, 1e-5)
    convert([tmp_path], tmp_path / "comfyui" / "lora.safetensors")
    assert_near(merged(tmp_path / "comfyui")(*inputs), expected, 1e-5)


@pytest.mark.parametrize(
    "fields",
    [
        {"peft_type": "BOFT"},
        {"layer_replication": [[0, 2]]},
        {"target_parameters": ["gamma"]},
        {"trainable_token_indices": [5]},
        {"init_lora_weights": "pissa_niter_4"},
        {"init_lora_weights": "olora"},
        {"use_qalora": True},
        {"alora_invocation_tokens": [1]},
    ],
)
def test_what_a_configuration_asks_for_is_refused_by_name(fields: dict[str, Any], tmp_path: Path) -> None:
    trained(prior()).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | fields))
    facts = ("adapter_model.safetensors", *(str(x) for x in (fields.get("peft_type") or next(iter(fields)),)))
    with pytest.raises(ValueError, match="adapter_config") as error:
        read_lora(tmp_path)
    assert all(fact in str(error.value) for fact in facts) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"r": 8},
        {"alpha_pattern": {"(": 1}},
        {"alpha_pattern": ["to_q"]},
        {"lora_alpha": "much"},
        {"lora_alpha": math.nan},
        {"lora_alpha": math.inf},
        {"rank_pattern": {"to_q": 3}},
    ],
)
def test_a_configuration_of_another_file_is_refused(fields: dict[str, Any], tmp_path: Path) -> None:
    trained(prior()).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | fields))
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors.*adapter_config"):
        read_lora(tmp_path)


DIFFUSERS = {name: LORAS[name] for name in ("alpha", "rslora", "patterns", "dora", "bias of the adapters")}


@pytest.mark.parametrize("name", DIFFUSERS)
@pytest.mark.parametrize("whole_pipeline", [True, False])
def test_a_header_of_diffusers_counts_as_in_diffusers(name: str, whole_pipeline: bool, tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers.pipelines.deprecated.wuerstchen")
    sizes = {"c": PRIOR.c, "c_cond": PRIOR.c_cond, "depth": PRIOR.depth, "nhead": PRIOR.nhead, "c_r": PRIOR.c_r}

    def theirs() -> Any:
        model = diffusers.WuerstchenPrior(**sizes, dropout=0.0)
        model.load_state_dict(prior().state_dict())
        return model.eval().requires_grad_(False)

    model, inputs = theirs(), NETWORKS["prior"].inputs()
    config = peft.LoraConfig(r=RANK, target_modules=ATTENTION, **DIFFUSERS[name])
    model.add_adapter(config)
    randomise(model)
    if whole_pipeline:
        diffusers.WuerstchenPriorPipeline.save_lora_weights(
            tmp_path, peft.get_peft_model_state_dict(model), unet_lora_adapter_metadata=config.to_dict()
        )
    else:
        model.save_lora_adapter(tmp_path)
    again = theirs()
    again.load_lora_adapter(tmp_path, prefix="prior" if whole_pipeline else None, use_safetensors=True)
    expected = again.eval()(*inputs)
    assert (expected - prior()(*inputs)).abs().max() > 0.003
    assert_near(merged(tmp_path)(*inputs), expected, 1e-5)
    convert([tmp_path], tmp_path / "converted.safetensors")
    assert_near(merged(tmp_path / "converted.safetensors")(*inputs), expected, 1e-5)


def test_pefts_text_encoder_beside_the_prior(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPTextConfig(
        hidden_size=TEXT.width, intermediate_size=64, num_hidden_layers=1, num_attention_heads=TEXT.heads
    )
    tower = transformers.CLIPTextModel(config).requires_grad_(False)
    before = {key: x.clone() for key, x in tower.state_dict().items()}
    model = trained(tower, target_modules=["q_proj", "fc1"], lora_alpha=6, alpha_pattern={"self_attn.q_proj": 3})
    model.save_pretrained(tmp_path / "text_encoder")
    trained(prior(), lora_alpha=8).save_pretrained(tmp_path / "prior")
    lora = read_lora(tmp_path)
    assert len(lora.network) == 8 and not lora.unknown
    after = model.merge_and_unload().state_dict()
    changed = {key for key, x in after.items() if not torch.equal(x, before[key])}
    assert {f"{path}.weight" for path in lora.text} == {key.removeprefix("text_model.") for key in changed}
    for key in changed:
        path = key.removeprefix("text_model.").removesuffix(".weight")
        assert_near(delta(lora.text[path].tensors), after[key] - before[key], 1e-6)


def kohya(**metadata: str) -> Mapping[str, Any]:
    state = FORMS["kohya"].write(random_factors(attention_of_prior()), {})
    down, up = (torch.ones(4, 16, 1, 1), torch.ones(64, 4, 1, 1)), torch.ones(4, 64, 3, 3)
    state |= {"lora_unet_projection.lora_down.weight": down[0], "lora_unet_projection.lora_up.weight": down[1]}
    state |= {"lora_unet_blocks_0_depthwise.lora_down.weight": up}
    state |= {"lora_unet_blocks_0_depthwise.lora_up.weight": torch.ones(1, 4, 1, 1)}
    return lora_from_state(state, metadata).network


def test_alphas_of_tensors_come_before_kohyas_header() -> None:
    header = {"ss_network_alpha": "8", "ss_network_args": json.dumps({"conv_dim": "4", "conv_alpha": "1"})}
    for metadata, plain, spatial in ((header, 8.0, 1.0), ({"ss_network_alpha": "2.0"}, 2.0, 2.0)):
        network = kohya(**metadata)
        assert float(network["blocks.2.attention.to_q"].tensors["alpha"]) == ALPHA
        assert float(network["projection"].tensors["alpha"]) == plain
        assert float(network["blocks.0.depthwise"].tensors["alpha"]) == spatial
    zero = {"ss_network_alpha": "0", "ss_network_args": "None"}
    for nothing in ({}, {"ss_network_alpha": "None"}, {"ss_network_alpha": "nan"}, zero):
        assert "alpha" not in kohya(**nothing)["projection"].tensors
    folded = FORMS["diffusers"].write(random_factors(attention_of_prior()), {})  # their converters multiply alpha in
    assert not any("alpha" in x.tensors for x in lora_from_state(folded, {"ss_network_alpha": "8"}).network.values())


def test_a_file_without_alphas_notes_those_of_its_header(tmp_path: Path) -> None:
    state = FORMS["kohya"].write(random_factors(attention_of_prior()), {})
    file = tmp_path / "kohya.safetensors"
    save_file({key: x for key, x in state.items() if not key.endswith("alpha")}, file, {"ss_network_alpha": "8"})
    assert (note := read_lora(file).note) and describe_lora(file).ignored == (note,)


def test_folders_name_one_lora(tmp_path: Path) -> None:
    state = FORMS["kohya"].write(random_factors(attention_of_prior()), {})
    (tmp_path / "README.md").write_text("mine")
    snapshot = tmp_path / "models--me--cats" / "snapshots" / "0123"  # of the hub's cache
    trained(prior()).save_pretrained(snapshot)
    (tmp_path / "models--me--cats" / "refs").mkdir()
    (tmp_path / "models--me--cats" / "refs" / "main").write_text("0123")
    assert is_lora(snapshot.parents[1]) and len(read_lora(snapshot.parents[1]).network) == 8
    with pytest.raises(ValueError, match="adapter_model"):
        read_lora(tmp_path)
    save_file(state, tmp_path / "one.safetensors")
    save_file({"blocks.0.weight": torch.ones(1)}, tmp_path / "model.safetensors")
    assert len(read_lora(tmp_path).network) == 8
    torch.save(state, tmp_path / "two.pt")
    with pytest.raises(ValueError, match=r"one\.safetensors, two\.pt"):
        read_lora(tmp_path)
    save_file(
        {key: x for key, x in state.items() if "_blocks_2_" in key}, tmp_path / "pytorch_lora_weights.safetensors"
    )
    assert len(read_lora(tmp_path).network) == 4
    for name in ("style", "face"):
        trained(prior()).save_pretrained(tmp_path / "runs" / name)
    with pytest.raises(ValueError, match=r"face.adapter_model\.safetensors, style.adapter_model\.safetensors"):
        read_lora(tmp_path / "runs")


def test_a_file_of_peft_without_its_configuration_says_so(tmp_path: Path) -> None:
    trained(prior(), lora_alpha=16).save_pretrained(tmp_path)
    state = load_file(tmp_path / "adapter_model.safetensors")
    alone = tmp_path / "loras" / "mine.safetensors"
    alone.parent.mkdir()
    save_file(state, alone)
    assert "adapter_config.json" in read_lora(alone).note
    (alone.parent / "adapter_config.json").write_bytes((tmp_path / "adapter_config.json").read_bytes())
    assert not read_lora(alone).note and read_lora(alone).strength == "adapter_config.json"
    save_file(state, alone.with_name("other.safetensors"))  # whose configuration is it?
    assert "adapter_config.json" in read_lora(alone).note and not read_lora(alone).strength
