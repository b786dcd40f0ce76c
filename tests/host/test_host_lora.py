"""LoRAs in the host: diffusers' numbers, every naming, stacks and strengths, and what fits nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bundles import Generate, Graph, find
from helpers.golden_data import Golden, assert_near
from helpers.lora_forms import ALPHA, FORMS, RANK, attention_of_prior, attention_of_tower, random_factors
from helpers.networks import NETWORKS
from inside_lora import STORED, WEIGHT
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from tools.comfyui.client import Inside, Install, Server, run_inside
from wuerstchen_core.checkpoints import load_prior, load_text_encoder, read_part, save_bundle
from wuerstchen_core.checkpoints.adapters import merge_lora
from wuerstchen_core.checkpoints.lora_files import lora_from_state
from wuerstchen_core.models.prior import Prior, PriorParams
from wuerstchen_core.models.text_encoder import TextEncoder, TextEncoderParams, tokenize
from wuerstchen_core.training.stages.lora import TEXT_ENCODER, AdapterConfig, attach, attach_text_encoder, write_lora

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
TRAINED = AdapterConfig(RANK, ALPHA, text_targets=("q_proj", "k_proj", "v_proj", "out_proj"))


def sdxl() -> dict[str, Tensor]:
    names = (
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q", "lora_te2_text_model_encoder_layers_0_mlp_fc1",
    )  # fmt: skip
    return {f"{name}.lora_{side}.weight": torch.ones(4, 4) for name in names for side in ("up", "down")}


def mixed() -> dict[str, Tensor]:
    """Of everything that is left out, something."""
    state = DIFFUSERS.write(NETWORK, TEXT) | sdxl() | {"bundle_emb.cat.clip_g": torch.ones(1, 64)}
    key = "prior.blocks.5.attention.to_q.lora_A.weight"
    return state | {key: torch.ones(RANK, 32)}


def loha(kind: str) -> dict[str, Tensor]:
    """A LoHa or LoKr of one module."""
    draw = torch.Generator().manual_seed(4)
    sizes = {"a": (64, RANK), "b": (RANK, 64)} if kind == "hada" else {"": (8, 8)}
    names = {f"{kind}_{w}{'_' * bool(side)}{side}": size for w in ("w1", "w2") for side, size in sizes.items()}
    module = f"lora_unet_{WEIGHT.removesuffix('.weight').replace('.', '_')}"
    return {f"{module}.{name}": torch.randn(size, generator=draw) * 0.3 for name, size in names.items()}


@pytest.fixture(scope="module")
def golden_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The prior of the golden numbers with towers of two widths, and a decoder."""
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
    """What inside_lora.py computed in this ComfyUI."""
    folder, golden = tmp_path_factory.mktemp("loras"), Golden("prior_small")
    states = {f"form {name}": form.write(NETWORK, TEXT) for name, form in FORMS.items()}
    states |= {"diffusers": DIFFUSERS.write(NETWORK, TEXT), "other": DIFFUSERS.write(*OTHER), "mixed": mixed()}
    states |= {"text": DIFFUSERS.write({}, TEXT), "loha": loha("hada"), "lokr": loha("lokr")}
    states["golden"] = {f"prior.{key}": x for key, x in Golden("prior_lora_diffusers").under("prior.").items()}
    for name, state in states.items():
        save_file(state, folder / f"{name}.safetensors")
    write_lora(folder / "trained.safetensors", trained(golden_bundle), TRAINED, {"training": {"step": 1}})
    (folder / "inputs").mkdir()
    inputs = {"x": golden["in/x"], "t": golden["in/r_tmix"], "text": golden["in/c"]}
    save_file(inputs, folder / "inputs" / "prior.safetensors")
    return run_inside(install, "inside_lora.py", folder / "inputs", golden_bundle, folder)


def trained(bundle: Path) -> Prior:
    """The core's prior, which holds its tower, with adapters of peft on both."""
    prior, words = load_prior(bundle), re.compile(r"^encoder\.layers\.(\d+)\.self_attn\.")
    attach_text_encoder(prior, load_text_encoder(bundle))
    attach(prior, TRAINED)
    changed = NETWORK | {
        words.sub(rf"{TEXT_ENCODER}.transformer.resblocks.\1.attn.", path): x for path, x in TEXT.items()
    }
    for name, half in (("B", 0), ("A", 1)):
        factors = {f"{path}.lora_{name}.default.weight": both[half] for path, both in changed.items()}
        prior.load_state_dict(prior.state_dict() | factors)
    return prior.eval().requires_grad_(False)


def noise(bundle: Path, *loras: tuple[dict[str, Tensor], float]) -> Tensor:
    """What the core's prior predicts with LoRAs merged into it."""
    part, golden = read_part(bundle, "prior"), Golden("prior_small")
    state = part.state_dict
    for lora, strength in loras:
        state = merge_lora(state, lora_from_state(lora).network, strength)
    prior = Prior(part.params).eval().requires_grad_(False)
    prior.load_state_dict(state)
    return prior(golden["in/x"], golden["in/r_tmix"], golden["in/c"])


def states(bundle: Path, *loras: tuple[Any, float]) -> Tensor:
    """What the core's tower of the prior says with factors added to its attention."""
    tower = load_text_encoder(bundle)
    attention = tower.transformer.resblocks[0].attn
    for factors, strength in loras:
        change = {
            path[-6]: up @ down * (SCALE * strength) for path, (up, down) in factors.items()
        }  # q, k, v, "t" of out
        attention.in_proj_weight += torch.cat([change[name] for name in "qkv"])
        attention.out_proj.weight += change["t"]
    return tower(*tokenize(["a red apple"]))


def test_the_golden_lora_gives_diffusers_numbers(inside: Inside) -> None:
    tensors, facts = inside
    assert_near(tensors["golden/noise"], Golden("prior_lora_diffusers")["golden/eps_tmix_with_lora"], TOLERANCE)
    assert_near(tensors["untouched/noise"], Golden("prior_small")["out/eps_tmix"], TOLERANCE)
    assert facts["golden"] == [False, True, []] and facts["untouched"] == [True, True, []]


def test_what_our_trainer_writes_changes_the_model_as_peft_does(inside: Inside, golden_bundle: Path) -> None:
    tensors, facts = inside
    golden = Golden("prior_small")
    wanted = trained(golden_bundle)(golden["in/x"], golden["in/r_tmix"], golden["in/c"])
    assert facts["trained"] == [False, False, []]
    assert_near(tensors["trained/noise"], wanted, TOLERANCE)
    assert (wanted - tensors["untouched/noise"]).abs().max() > 0.01
    wanted = trained(golden_bundle).get_submodule(TEXT_ENCODER)(*tokenize(["a red apple"]))
    assert_near(tensors["trained/states"], wanted, TOLERANCE)
    assert_near(wanted, states(golden_bundle, (TEXT, 1.0)), TOLERANCE)
    assert (wanted - tensors["untouched/states"]).abs().max() > 0.01


def test_every_naming_changes_model_and_clip_alike(inside: Inside, golden_bundle: Path) -> None:
    tensors, facts = inside
    wanted = noise(golden_bundle, (DIFFUSERS.write(NETWORK, {}), 1.0)), states(golden_bundle, (TEXT, 1.0))
    assert (wanted[0] - tensors["untouched/noise"]).abs().max() > 0.01
    assert (wanted[1] - tensors["untouched/states"]).abs().max() > 0.01
    for name in FORMS:
        assert facts[f"form/form {name}"] == [False, False, []], name
        assert_near(tensors[f"form/form {name}/noise"], wanted[0], TOLERANCE)
        assert_near(tensors[f"form/form {name}/states"], wanted[1], TOLERANCE)


def test_stacks_and_strengths(inside: Inside, golden_bundle: Path) -> None:
    tensors, facts = inside
    one, other = DIFFUSERS.write(NETWORK, {}), DIFFUSERS.write(OTHER[0], {})
    wanted = noise(golden_bundle, (one, 1.0), (other, -0.5)), states(golden_bundle, (TEXT, 1.0), (OTHER[1], 2.0))
    assert_near(tensors["stacked/noise"], wanted[0], TOLERANCE)
    assert_near(tensors["stacked/states"], wanted[1], TOLERANCE)
    for kind in ("noise", "states"):
        assert_near(tensors[f"there and back/{kind}"], tensors[f"untouched/{kind}"], TOLERANCE)
    assert facts["model only"] == [False, True, []] and facts["clip only"] == [True, False, []]
    assert_near(tensors["clip only/states"], states(golden_bundle, (TEXT, 1.0)), TOLERANCE)
    for kind, name in (("loha", "hada"), ("lokr", "lokr")):
        assert_near(tensors[f"{kind}/noise"], noise(golden_bundle, (loha(name), 0.5)), TOLERANCE)


def test_the_converted_file_gives_the_same_in_comfyuis_own_loader(inside: Inside) -> None:
    tensors, facts = inside
    assert facts["converted"][0] == "diffusers_comfyui.safetensors" and facts["stock"] == []
    for kind in ("noise", "states"):
        assert torch.equal(tensors[f"stock/{kind}"], tensors[f"form/form diffusers/{kind}"])
    assert facts["written once"] == [True, True]
    assert "diffusers_comfyui.safetensors is there already" in facts["not over another"]


@pytest.mark.parametrize("name", STORED)
def test_weights_stored_in_few_bits_are_changed_within_one_rounding(inside: Inside, name: str) -> None:
    tensors, facts = inside
    up, down = NETWORK[WEIGHT.removesuffix(".weight")]
    before, after = tensors[f"{name}/before"], tensors[f"{name}/after"]
    exact = before + up @ down * SCALE
    info = torch.finfo(STORED[name])
    assert facts[name] == str(STORED[name]) and (after - before).abs().max() > 0.05
    step = (exact.abs() * 2 * info.eps).clamp(min=info.smallest_normal * info.eps)  # twice: its power of two may change
    assert ((after - exact).abs() <= step).all()
    assert tensors[f"{name}/noise"].isfinite().all()


def test_what_is_left_out_is_told_in_one_line(inside: Inside) -> None:
    [line] = inside[1]["mixed"]
    for words in (
        "mixed.safetensors: left out are 4 keys that fit nothing (lora_",
        "2 keys of other sizes (prior.blocks.5.attention.to_q.lora_",
        "blocks.5.attention.to_q's weight is 64x64, its change 64x32",
        "8 keys of the text tower, for which no CLIP is connected",
        "1 bundled embeddings (bundle_emb.cat.clip_g)",
    ):
        assert words in line
    assert "\n" not in line


def test_what_fits_nothing_is_refused_in_one_sentence(inside: Inside) -> None:
    facts = inside[1]
    for name, words in {
        "to the decoder": ("looks made for Würstchen's prior", "take a LoRA made for this decoder"),
        "with the other clip": ("64x64", "connect the prior clip output"),
        "two towers": ("a CLIP of 2 text towers", "connect the prior clip output"),
        "another model": ("given another model (Identity)", "connect the prior output"),
        "text alone": ("changes a text tower only",),
    }.items():
        assert all(word in facts[name] for word in words), facts[name]
        assert "\n" not in facts[name] and len(facts[name]) < 300


@pytest.fixture(scope="module")
def loras(models: Path) -> Path:
    """The folder of LoRAs, with those of this module in it."""
    folder = models / "loras"
    for name, state in {
        "tiny": DIFFUSERS.write(random_factors(attention_of_prior()), random_factors(attention_of_tower(32))),
        "sdxl": sdxl(),
        "wide": DIFFUSERS.write(random_factors(attention_of_prior(1536)), {}),
    }.items():
        save_file(state, folder / f"{name}.safetensors", {"author": "me"})
    (folder / "tiny_comfyui.safetensors").unlink(missing_ok=True)  # of the other host
    return folder


def with_lora(graph: Graph, kind: str, name: str, **inputs: Any) -> Graph:
    """The graph with a LoRA loader between the bundle and its prior, and the prior's CLIP if the loader takes one."""
    graph = json.loads(json.dumps(graph))
    source = next(key for key, node in graph.items() if node["class_type"] == BUNDLE)
    given = {"model": [source, 0], "lora_name": name, "strength_model": 4.0, **inputs}
    if kind == LOADER:
        given = {"clip": [source, 2], "strength_clip": 0.0, "save_converted": False, **given}
        find(graph, TEXT_ENCODE)["prior_clip"] = ["lora", 1]
    graph["lora"] = {"class_type": kind, "inputs": given}
    find(graph, PRIOR)["model"] = ["lora", 0]
    return graph


def test_the_converted_file_paints_the_same_with_lora_loader_model_only(
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
    plain, ours, theirs, none, both = (np.array(generate(run).pictures[0]) for run in runs)
    assert (ours == theirs).all() and (none == plain).all()
    assert (ours != plain).any() and (both != ours).any()
    with safe_open(loras / "tiny_comfyui.safetensors", "pt") as file:
        assert file.metadata() == {"author": "me"}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("sdxl", ("none of its 4 keys", "looks made for Stable Diffusion or SDXL", "take a LoRA made for this prior")),
        ("wide", ("a model of other sizes", "weight is 64x64, its change 1536x1536")),
    ],
)
def test_a_lora_of_another_model_is_refused_and_the_host_goes_on(
    server: Server, graph: Graph, generate: Generate, loras: Path, name: str, words: tuple[str, ...]
) -> None:
    find(graph, "WuerstchenEmptyLatents").update(width=128, height=128)
    outcome = server.run(with_lora(graph, LOADER, f"{name}.safetensors"))
    assert outcome.status == "execution_error" and "\n" not in outcome.error and len(outcome.error) < 300
    assert f"{name}.safetensors" in outcome.error and all(word in outcome.error for word in words), outcome.error
    assert len(generate(graph).pictures) == 1
