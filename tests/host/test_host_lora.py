"""LoRAs in ComfyUI: diffusers' numbers, all key formats, stacks and strengths, and files that do not fit."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from bundles import Generate, Graph, find
from errors import check_error
from helpers.golden_data import Golden, assert_near
from helpers.lora_forms import ALPHA, FORMS, RANK, attention_of_prior, attention_of_tower, random_factors
from helpers.networks import NETWORKS
from inside_lora import STORED, STRENGTH, WEIGHT
from inside_lora_training import ALGORITHMS, PICTURES
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from tools.comfyui.client import Inside, Install, Server, run_inside
from wuerstchen_core.checkpoints import load_prior, load_text_encoder, read_part, save_bundle
from wuerstchen_core.checkpoints.adapters import fit, merge_lora
from wuerstchen_core.checkpoints.convert import convert
from wuerstchen_core.checkpoints.key_maps import text_to_transformers
from wuerstchen_core.checkpoints.lora_files import lora_from_state
from wuerstchen_core.models.prior import Prior, PriorParams
from wuerstchen_core.models.text_encoder import TextEncoder, TextEncoderParams, tokenize
from wuerstchen_core.training.stages.adapters import AdapterConfig, Layer, attach
from wuerstchen_core.training.stages.diffusion import TEXT_ENCODER
from wuerstchen_core.training.stages.lora_output import write_lora
from wuerstchen_core.training.stages.text_tower import attach_text_encoder

LOADER, BUNDLE, PRIOR, TEXT_ENCODE = (
    "WuerstchenLoraLoader",
    "WuerstchenBundleLoader",
    "WuerstchenPriorSample",
    "WuerstchenTextEncode",
)
TOLERANCE = 1e-5  # of the golden numbers, observed 1e-6
SCALE = ALPHA / RANK
NETWORK, TEXT = random_factors(attention_of_prior()), random_factors(attention_of_tower(64), seed=1)
OTHER = random_factors(attention_of_prior(), seed=2), random_factors(attention_of_tower(64), seed=3)
DIFFUSERS = FORMS["diffusers"]
PEFT: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("LoraConfig", {"lora_alpha": 6, "use_rslora": True, "rank_pattern": {"to_v": 2}, "bias": "lora_only"}),
    "dora": ("LoraConfig", {"alpha_pattern": {r"2\.attention\.to_.": 16}, "use_dora": True}),
    "biases": ("LoraConfig", {"bias": "all", "lora_bias": True, "modules_to_save": ["projection", "cond_mapper"]}),
    "loha": ("LoHaConfig", {"alpha": 3, "target_modules": ["to_q", "depthwise"], "use_effective_conv2d": True}),
    "lokr": ("LoKrConfig", {"alpha": 3, "target_modules": ["to_q", "depthwise"], "use_effective_conv2d": True}),
    "whole lokr": ("LoKrConfig", {"alpha": 3, "r": 40}),
}
TRAINED = AdapterConfig(RANK, ALPHA, text_targets=("q_proj", "k_proj", "v_proj", "out_proj"))
KINDS: dict[str, dict[str, Any]] = {
    **{kind: {"kind": kind} for kind in ("dora", "loha", "lokr")},
    "lora of convolutions": {"targets": ("to_q", "projection", "out.1"), "alpha": 0.5},
    "dora of convolutions": {"kind": "dora", "targets": ("to_q", "projection", "out.1"), "alpha": 0.5},
    "lokr of convolutions": {"kind": "lokr", "targets": ("to_q", "depthwise", "projection")},
}


def sdxl() -> dict[str, Tensor]:
    names = (
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q", "lora_te2_text_model_encoder_layers_0_mlp_fc1",
    )  # fmt: skip
    return {f"{name}.lora_{side}.weight": torch.ones(4, 4) for name in names for side in ("up", "down")}


def mixed() -> dict[str, Tensor]:
    """Returns a LoRA with keys of each kind that is ignored."""
    state = DIFFUSERS.write(NETWORK, TEXT) | sdxl() | {"bundle_emb.cat.clip_g": torch.ones(1, 64)}
    key = "prior.blocks.5.attention.to_q.lora_A.weight"
    return state | {key: torch.ones(RANK, 32)}


def loha(kind: str) -> dict[str, Tensor]:
    """Returns a LoHa or LoKr of one module."""
    draw = torch.Generator().manual_seed(4)
    sizes = {"a": (64, RANK), "b": (RANK, 64)} if kind == "hada" else {"": (8, 8)}
    names = {f"{kind}_{w}{'_' * bool(side)}{side}": size for w in ("w1", "w2") for side, size in sizes.items()}
    module = f"lora_unet_{WEIGHT.removesuffix('.weight').replace('.', '_')}"
    return {f"{module}.{name}": torch.randn(size, generator=draw) * 0.3 for name, size in names.items()}


@pytest.fixture(scope="module")
def golden_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the golden prior, text encoders of two widths, and a decoder."""
    golden = Golden("prior_small")
    prior = Prior(PriorParams(**golden.sizes()))
    prior.load_state_dict(golden.weights())
    parts: dict[str, torch.nn.Module] = {"prior": prior, "decoder": NETWORKS["decoder"].perturbed()}
    for stage, width in (("prior", 64), ("decoder", 32)):
        torch.manual_seed(0)
        parts[f"{stage}_text_encoder"] = TextEncoder(TextEncoderParams(width=width, heads=2, layers=2))
        parts[f"{stage}_text_encoder"].init_weights()
    path = tmp_path_factory.mktemp("golden") / "golden.safetensors"
    save_bundle(path, parts, {})
    return path


@pytest.fixture(scope="module")
def inside(install: Install, golden_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Inside:
    """The results of inside_lora.py in this ComfyUI."""
    folder, golden = tmp_path_factory.mktemp("loras"), Golden("prior_small")
    states = {f"form {name}": form.write(NETWORK, TEXT) for name, form in FORMS.items()}
    states |= {"diffusers": DIFFUSERS.write(NETWORK, TEXT), "other": DIFFUSERS.write(*OTHER), "mixed": mixed()}
    states |= {"text": DIFFUSERS.write({}, TEXT), "loha": loha("hada"), "lokr": loha("lokr")}
    states["golden"] = {f"prior.{key}": x for key, x in Golden("prior_lora_diffusers").under("prior.").items()}
    for name, state in states.items():
        save_file(state, folder / f"{name}.safetensors")
    write_lora(folder / "trained.safetensors", *trained(golden_bundle), {"training": {"step": 1}})
    for kind in KINDS:
        write_lora(folder / f"kind {kind}.safetensors", *of_kind(golden_bundle, kind), {})
    biases = {f"base_model.model.encoder.layers.0.self_attn.{x}_proj.base_layer.bias" for x in ("q", "k", "v", "out")}
    (folder / "text biases").mkdir()
    save_file({key: torch.full((64,), 0.25) for key in biases}, folder / "text biases" / "adapter_model.safetensors")
    (folder / "text biases" / "adapter_config.json").write_text('{"peft_type": "LORA", "bias": "all"}')
    for name in PEFT:
        by_peft(golden_bundle, name).save_pretrained(folder / f"peft {name}")
    (folder / "inputs").mkdir()
    inputs = {"x": golden["in/x"], "t": golden["in/r_tmix"], "text": golden["in/c"]}
    save_file(inputs, folder / "inputs" / "prior.safetensors")
    return run_inside(install, "inside_lora.py", folder / "inputs", golden_bundle, folder)


def trained(bundle: Path) -> tuple[Any, AdapterConfig, Mapping[str, Layer]]:
    """Returns the core's prior and its text encoder with adapters of peft on both, and what `write_lora` needs."""
    prior, words = load_prior(bundle), re.compile(r"^encoder\.layers\.(\d+)\.self_attn\.")
    attach_text_encoder(prior, load_text_encoder(bundle))
    layers = attach(prior, TRAINED)
    changed = NETWORK | {
        words.sub(rf"{TEXT_ENCODER}.transformer.resblocks.\1.attn.", path): x for path, x in TEXT.items()
    }
    for name, half in (("B", 0), ("A", 1)):
        factors = {f"{path}.lora_{name}.default.weight": both[half] for path, both in changed.items()}
        prior.load_state_dict(prior.state_dict() | factors)
    return prior.eval().requires_grad_(False), TRAINED, layers


def of_kind(bundle: Path, kind: str) -> tuple[Any, AdapterConfig, Mapping[str, Layer]]:
    """Returns `trained` with other adapters, of random values."""
    prior, config = load_prior(bundle), replace(TRAINED, rank_pattern={"to_q": 2}, **KINDS[kind])
    attach_text_encoder(prior, load_text_encoder(bundle))
    torch.manual_seed(6)
    layers = attach(prior, config)
    values = {key: x + 0.1 * torch.randn(x.shape) for key, x in prior.state_dict().items()}
    prior.load_state_dict(values)
    return prior.eval().requires_grad_(False), config, layers


def by_peft(bundle: Path, name: str) -> Any:
    """Returns the prior with random adapters of peft."""
    kind, fields = PEFT[name]
    config = getattr(peft, kind)(**{"r": RANK, "target_modules": ["to_q", "to_v"], **fields})
    torch.manual_seed(5)
    model = peft.get_peft_model(load_prior(bundle), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape) * 0.1
    return model.eval().requires_grad_(False)


def noise(bundle: Path, *loras: tuple[dict[str, Tensor], float]) -> Tensor:
    """Returns the prediction of the core's prior with LoRAs merged into it."""
    part, golden = read_part(bundle, "prior"), Golden("prior_small")
    state = part.state_dict
    for lora, strength in loras:
        state = merge_lora(state, lora_from_state(lora).network, strength)
    prior = Prior(part.params).eval().requires_grad_(False)
    prior.load_state_dict(state)
    return prior(golden["in/x"], golden["in/r_tmix"], golden["in/c"])


def states(bundle: Path, *loras: tuple[Any, float]) -> Tensor:
    """Returns the states of the core's text encoder with factors added to its attention."""
    tower = load_text_encoder(bundle)
    attention = tower.transformer.resblocks[0].attn
    for factors, strength in loras:
        change = {
            path[-6]: up @ down * (SCALE * strength) for path, (up, down) in factors.items()
        }  # q, k, v, "t" of out
        attention.in_proj_weight += torch.cat([change[name] for name in "qkv"])
        attention.out_proj.weight += change["t"]
    return tower(*tokenize(["a red apple"]))


def test_pefts_biases_of_a_text_encoder(inside: Inside, golden_bundle: Path) -> None:
    tower = load_text_encoder(golden_bundle)
    for name in ("in_proj_bias", "out_proj.bias"):
        tower.transformer.resblocks[0].attn.get_parameter(name).fill_(0.25)
    assert_near(inside[0]["text biases/states"], tower(*tokenize(["a red apple"])), TOLERANCE)
    assert inside[1]["text biases"][2] == []


def test_pefts_configuration_counts_as_in_peft(inside: Inside, golden_bundle: Path) -> None:
    golden, (tensors, facts) = Golden("prior_small"), inside
    inputs = (golden["in/x"], golden["in/r_tmix"], golden["in/c"])
    for name in PEFT:
        expected = by_peft(golden_bundle, name)(*inputs)
        assert_near(tensors[f"peft {name}/noise"], expected, TOLERANCE)
        assert (expected - tensors["untouched/noise"]).abs().max() > 1e-3 and facts[f"peft {name}"][2] == []


def test_the_golden_lora_gives_diffusers_numbers(inside: Inside) -> None:
    tensors, facts = inside
    assert_near(tensors["golden/noise"], Golden("prior_lora_diffusers")["golden/eps_tmix_with_lora"], TOLERANCE)
    assert_near(tensors["untouched/noise"], Golden("prior_small")["out/eps_tmix"], TOLERANCE)
    assert facts["golden"] == [False, True, []] and facts["untouched"] == [True, True, []]


def test_trained_loras_have_the_effect_of_peft(inside: Inside, golden_bundle: Path) -> None:
    tensors, facts = inside
    golden = Golden("prior_small")
    prior, *_ = trained(golden_bundle)
    expected = prior(golden["in/x"], golden["in/r_tmix"], golden["in/c"])
    assert facts["trained"] == [False, False, []]
    assert_near(tensors["trained/noise"], expected, TOLERANCE)
    assert (expected - tensors["untouched/noise"]).abs().max() > 0.01
    expected = prior.get_submodule(TEXT_ENCODER)(*tokenize(["a red apple"]))
    assert_near(tensors["trained/states"], expected, TOLERANCE)
    assert_near(expected, states(golden_bundle, (TEXT, 1.0)), TOLERANCE)
    assert (expected - tensors["untouched/states"]).abs().max() > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_trained_adapters_of_every_kind_have_the_effect_of_peft(kind: str, inside: Inside, golden_bundle: Path) -> None:
    """ComfyUI's own formula for DoRA is another one, so only the pack's loader applies that exactly."""
    (tensors, facts), golden, (prior, *_) = inside, Golden("prior_small"), of_kind(golden_bundle, kind)
    expected = {
        "noise": prior(golden["in/x"], golden["in/r_tmix"], golden["in/c"]),
        "states": prior.get_submodule(TEXT_ENCODER)(*tokenize(["a red apple"])),
    }
    assert facts[f"kind {kind}"] == [False, False, []] and facts[f"kind {kind} in stock"] == []
    for name, value in expected.items():
        assert_near(tensors[f"kind {kind}/{name}"], value, TOLERANCE)
        if KINDS[kind].get("kind") != "dora":
            assert_near(tensors[f"kind {kind} in stock/{name}"], value, TOLERANCE)
        assert (value - tensors[f"untouched/{name}"]).abs().max() > 0.01


def test_comfyuis_own_nodes_apply_trained_loras_fully(inside: Inside) -> None:
    tensors, facts = inside
    assert facts["trained in stock"] == []
    for name in ("trained in stock/noise", "hook/noise", "trained in stock/states"):
        assert torch.equal(tensors[name], tensors[f"trained/{name.rpartition('/')[2]}"]), name


def test_files_of_every_kind_are_merged_as_in_comfyui(inside: Inside, golden_bundle: Path) -> None:
    tensors, facts = inside

    def under(prefix: str) -> dict[str, Tensor]:
        return {key.removeprefix(prefix): x for key, x in tensors.items() if key.startswith(prefix)}

    parts = {name: read_part(golden_bundle, name).state_dict for name in ("prior", "decoder")}
    tower = text_to_transformers(read_part(golden_bundle, "prior_text_encoder").state_dict)
    names = [name.removeprefix("file/") for name in facts if name.startswith("file/")]
    assert len(names) == 15, names
    for name in names:
        lora, expected = lora_from_state(under(f"file/{name}/")), {}
        for prefix, state, adapters in (
            ("diffusion_model.", parts["decoder" if name.startswith("stage b") else "prior"], lora.network),
            ("clip_g.transformer.text_model.", tower, lora.text),
        ):
            found = fit(adapters, {key: x.shape for key, x in state.items()})
            merged = merge_lora(state, found.fitting, STRENGTH)
            expected |= {f"{prefix}{key}": x for key, x in merged.items() if not torch.equal(x, state[key])}
        ours, stock = under(f"ours/{name}/"), under(f"stock/{name}/")
        stock.pop("clip_g.transformer.text_projection.weight", None)  # no part of our text encoders
        assert ours.keys() == stock.keys() == expected.keys(), name
        for key, x in expected.items():
            assert_near(ours[key], x, 1e-6)
            if name == "dora of rows" and not key.endswith("bias"):  # ComfyUI's formula differs from peft's
                assert (stock[key] - x).abs().max() > 1e-4
            else:
                assert_near(stock[key], x, 1e-6)
        lines, stock_lines = facts[f"file/{name}"]
        assert stock_lines == [] and not lora.unknown
        assert all("text_projection" in line for line in lines) and len(lines) == (name == "full_diff")
    part, golden = read_part(golden_bundle, "prior"), Golden("prior_small")
    prior = Prior(part.params).eval().requires_grad_(False)
    prior.load_state_dict(merge_lora(part.state_dict, lora_from_state(under("file/norms/")).network, STRENGTH))
    assert_near(tensors["norms/noise"], prior(golden["in/x"], golden["in/r_tmix"], golden["in/c"]), TOLERANCE)


def test_all_key_formats_have_the_same_effect(inside: Inside, golden_bundle: Path) -> None:
    tensors, facts = inside
    expected = noise(golden_bundle, (DIFFUSERS.write(NETWORK, {}), 1.0)), states(golden_bundle, (TEXT, 1.0))
    assert (expected[0] - tensors["untouched/noise"]).abs().max() > 0.01
    assert (expected[1] - tensors["untouched/states"]).abs().max() > 0.01
    for name in FORMS:
        *same, lines = facts[f"form/form {name}"]
        assert same == [False, False], name
        assert all("adapter_config.json" in line for line in lines) and len(lines) == (name == "peft"), name
        assert_near(tensors[f"form/form {name}/noise"], expected[0], TOLERANCE)
        assert_near(tensors[f"form/form {name}/states"], expected[1], TOLERANCE)


def test_stacks_and_strengths(inside: Inside, golden_bundle: Path) -> None:
    tensors, facts = inside
    one, other = DIFFUSERS.write(NETWORK, {}), DIFFUSERS.write(OTHER[0], {})
    expected = noise(golden_bundle, (one, 1.0), (other, -0.5)), states(golden_bundle, (TEXT, 1.0), (OTHER[1], 2.0))
    assert_near(tensors["stacked/noise"], expected[0], TOLERANCE)
    assert_near(tensors["stacked/states"], expected[1], TOLERANCE)
    for kind in ("noise", "states"):
        assert_near(tensors[f"there and back/{kind}"], tensors[f"untouched/{kind}"], TOLERANCE)
    assert facts["model only"] == [False, True, []] and facts["clip only"] == [True, False, []]
    assert_near(tensors["clip only/states"], states(golden_bundle, (TEXT, 1.0)), TOLERANCE)
    for kind, name in (("loha", "hada"), ("lokr", "lokr")):
        assert_near(tensors[f"{kind}/noise"], noise(golden_bundle, (loha(name), 0.5)), TOLERANCE)


def test_the_converted_file_has_the_same_effect_in_comfyuis_loader(inside: Inside) -> None:
    tensors, facts = inside
    assert facts["converted"][0] == "diffusers_comfyui.safetensors" and facts["stock"] == []
    for kind in ("noise", "states"):
        assert torch.equal(tensors[f"stock/{kind}"], tensors[f"form/form diffusers/{kind}"])
    assert facts["written once"] == [True, True]
    check_error(facts["different file"], "diffusers_comfyui.safetensors", "save_converted")


@pytest.mark.parametrize("name", STORED)
def test_quantised_weights_change_within_one_rounding(inside: Inside, name: str) -> None:
    tensors, facts = inside
    up, down = NETWORK[WEIGHT.removesuffix(".weight")]
    before, after = tensors[f"{name}/before"], tensors[f"{name}/after"]
    exact = before + up @ down * SCALE
    info = torch.finfo(STORED[name])
    assert facts[name] == str(STORED[name]) and (after - before).abs().max() > 0.05
    step = (exact.abs() * 2 * info.eps).clamp(min=info.smallest_normal * info.eps)  # twice: the exponent may change
    assert ((after - exact).abs() <= step).all()
    assert tensors[f"{name}/noise"].isfinite().all()


def test_a_distilled_lora_names_the_widgets_to_set(inside: Inside) -> None:
    ignored, line = inside[1]["distilled"]
    assert [ignored] == inside[1]["distilled at 0"]
    assert "turbo" in line and "steps to 2" in line and "cfg to 1" in line and "Würstchen Prior Sample" in line


def test_ignored_keys_are_logged_in_one_line(inside: Inside) -> None:
    [line] = inside[1]["mixed"]
    facts = "mixed.safetensors", "4 keys", "2 keys", "64x64", "64x32", "8 keys", "1 bundled", "bundle_emb.cat.clip_g"
    assert "\n" not in line and all(fact in line for fact in facts)


MISTAKES = {  # what the error must name
    "to the decoder": ("diffusers.safetensors", "prior", "this decoder"),
    "with the other clip": ("diffusers.safetensors", "64x64", "prior clip"),
    "two text encoders": ("2 text encoders", "prior clip"),
    "another model": ("Identity", "prior output"),
    "text alone": ("text.safetensors", "text encoder"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_lora_that_does_not_fit_is_explained_in_one_line(inside: Inside, mistake: str) -> None:
    check_error(inside[1][mistake], *MISTAKES[mistake])


@pytest.mark.parametrize("stage", ["prior", "decoder"])
def test_comfyuis_training_learns_on_both_stages(inside: Inside, stage: str) -> None:
    tensors, facts = inside[0], inside[1]["training"]
    for algorithm in ALGORITHMS:
        ratios = np.divide(facts[f"{stage}/{algorithm}"], facts[f"{stage}/slowest"])  # same noise at each step
        assert ratios.mean() < 0.995, algorithm
    assert facts[f"{stage}/combined"] == pytest.approx(facts[f"{stage}/{ALGORITHMS[0]}"], rel=1e-3)
    assert np.isfinite(facts[f"{stage}/fp8"]).all()
    for algorithm in ALGORITHMS:
        assert (tensors[f"{stage}/{algorithm}/applied"] - tensors[f"{stage}/untouched"]).abs().max() > 0.01
    assert torch.equal(tensors[f"{stage}/saved"], tensors[f"{stage}/{ALGORITHMS[-1]}/applied"])
    assert torch.equal(tensors[f"{stage}/afterwards"], tensors[f"{stage}/untouched"])
    assert facts[f"{stage}/plain"] and facts[f"{stage}/copied"]


@pytest.mark.parametrize("stage", ["prior", "decoder"])
def test_bypass_mode_equals_patched_weights(inside: Inside, stage: str) -> None:
    tensors, facts = inside[0], inside[1]["training"]
    if not facts["bypass"]:
        pytest.skip("this ComfyUI has no bypass mode")
    for algorithm in ALGORITHMS:
        name = f"{stage}/{algorithm}"
        for losses in facts[f"{name}/bypassed"]:
            assert losses == pytest.approx(facts[name], rel=1e-3)
        assert_near(tensors[f"{name}/bypass"], tensors[f"{name}/applied"], 1e-3)


@pytest.mark.parametrize("stage", ["prior", "decoder"])
def test_training_that_comfyui_would_do_wrong_is_refused(inside: Inside, stage: str) -> None:
    facts = inside[1]["training"]
    check_error(facts[f"{stage}/batched"], f"{PICTURES} ", "Conditioning (Combine)")
    if facts["bypass"]:
        check_error(facts[f"{stage}/sizes"], "several sizes", "bucket_mode")


@pytest.fixture(scope="module")
def loras(models: Path) -> Path:
    """The loras folder with the files of this module."""
    folder = models / "loras"
    for name, state in {
        "tiny": DIFFUSERS.write(random_factors(attention_of_prior()), random_factors(attention_of_tower(32))),
        "sdxl": sdxl(),
        "wide": DIFFUSERS.write(random_factors(attention_of_prior(1536)), {}),
    }.items():
        save_file(state, folder / f"{name}.safetensors", {"author": "me"})
    (folder / "tiny_comfyui.safetensors").unlink(missing_ok=True)  # of the other ComfyUI
    return folder


def with_lora(graph: Graph, kind: str, name: str, **inputs: Any) -> Graph:
    """Returns the prompt with a LoRA loader after the bundle's prior, and its CLIP if the loader takes one."""
    graph = json.loads(json.dumps(graph))
    source = next(key for key, node in graph.items() if node["class_type"] == BUNDLE)
    settings = {"model": [source, 0], "lora_name": name, "strength_model": 4.0, **inputs}
    if kind == LOADER:
        settings = {"clip": [source, 2], "strength_clip": 0.0, "save_converted": False, **settings}
        find(graph, TEXT_ENCODE)["prior_clip"] = ["lora", 1]
    graph["lora"] = {"class_type": kind, "inputs": settings}
    find(graph, PRIOR)["model"] = ["lora", 0]
    return graph


def test_the_converted_file_gives_the_same_image_in_lora_loader_model_only(
    server: Server, graph: Graph, generate: Generate, loras: Path
) -> None:
    find(graph, "WuerstchenEmptyLatents").update(width=128, height=128)
    runs = (
        graph,
        with_lora(graph, LOADER, "tiny.safetensors", save_converted=True),
        with_lora(graph, "LoraLoaderModelOnly", "tiny_comfyui.safetensors"),
        with_lora(graph, LOADER, "tiny.safetensors", strength_model=0.0),
        with_lora(graph, LOADER, "tiny.safetensors", strength_clip=4.0),
    )
    plain, ours, stock, none, both = (np.array(generate(run).pictures[0]) for run in runs)
    assert (ours == stock).all() and (none == plain).all()
    assert (ours != plain).any() and (both != ours).any()
    with safe_open(loras / "tiny_comfyui.safetensors", "pt") as file:
        assert (file.metadata()["author"], file.metadata()["modelspec.architecture"]) == (
            "me",
            "wuerstchen-v2-prior/lora",
        )
    [converted] = convert([loras / "tiny.safetensors"], loras / "tiny_by_command.safetensors", force=True)
    assert converted.read_bytes() == (loras / "tiny_comfyui.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        ("sdxl", ("4 keys", "Stable Diffusion or SDXL", "this prior")),
        ("wide", ("64x64", "1536x1536", "this prior")),
    ],
)
def test_after_a_lora_of_another_model_the_next_prompt_runs(
    server: Server, graph: Graph, generate: Generate, loras: Path, name: str, facts: tuple[str, ...]
) -> None:
    find(graph, "WuerstchenEmptyLatents").update(width=128, height=128)
    outcome = server.run(with_lora(graph, LOADER, f"{name}.safetensors"))
    assert outcome.status == "execution_error"
    check_error(outcome.error, f"{name}.safetensors", *facts)
    assert len(generate(graph).pictures) == 1
