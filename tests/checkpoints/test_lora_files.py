"""Tests LoRA files in every naming, against diffusers' results and each other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.golden_data import Golden, assert_near
from helpers.lora_forms import ALPHA, FORMS, RANK, attention_of_prior, attention_of_tower, random_factors
from helpers.networks import NETWORKS
from safetensors.torch import save_file
from torch import Tensor, nn

from wuerstchen_core.checkpoints.adapters import Adapter, delta, fit, merge_lora
from wuerstchen_core.checkpoints.lora_files import lora_from_state, read_lora
from wuerstchen_core.checkpoints.lora_keys import parse_key
from wuerstchen_core.checkpoints.weight_files import read_weight_file
from wuerstchen_core.models.prior import Prior, PriorParams

NETWORK, TEXT = random_factors(attention_of_prior()), random_factors(attention_of_tower(32), seed=1)


def shapes(network: nn.Module) -> dict[str, torch.Size]:
    return {key: x.shape for key, x in network.state_dict().items()}


def adapters_of(**tensors: Tensor) -> dict[str, Adapter]:
    """Returns the adapters of a file for one module; `__` stands for a dot in a tensor's name."""
    state = {f"prior.blocks.2.attention.to_q.{name.replace('__', '.')}": x for name, x in tensors.items()}
    return lora_from_state(state).network


def test_a_merged_lora_equals_diffusers() -> None:
    golden, lora = Golden("prior_small"), Golden("prior_lora_diffusers")
    prior = Prior(PriorParams(**golden.sizes())).eval().requires_grad_(False)
    adapters = lora_from_state({f"prior.{key}": x for key, x in lora.under("prior.").items()}).network
    inputs = (golden["in/x"], golden["in/r_tmix"], golden["in/c"])
    expected = lora["golden/eps_tmix_with_lora"]
    prior.load_state_dict(merge_lora(golden.weights(), adapters))
    assert_near(prior(*inputs), expected, 1e-5)  # observed 1e-6
    prior.load_state_dict(merge_lora(golden.weights(), adapters, 0.5))
    assert (prior(*inputs) - expected).abs().max() > 1e-3
    prior.load_state_dict(merge_lora(merge_lora(golden.weights(), adapters, 3.0), adapters, -3.0))
    assert_near(prior(*inputs), golden["out/eps_tmix"], 1e-5)


@pytest.mark.parametrize("name", FORMS)
def test_every_naming_gives_the_same_adapters(name: str) -> None:
    lora = lora_from_state(FORMS[name].write(NETWORK, TEXT))
    assert not lora.unknown and not lora.embeddings
    for adapters, factors in ((lora.network, NETWORK), (lora.text, TEXT)):
        assert list(adapters) == list(factors)
        for path, (up, down) in factors.items():
            assert_near(delta(adapters[path].tensors), up @ down * (ALPHA / RANK), 1e-7)


@pytest.mark.parametrize("name", ["prior", "decoder"])
def test_flat_names_find_every_module(name: str) -> None:
    for path in (key.removesuffix(".weight") for key in shapes(NETWORKS[name].build()) if key.endswith(".weight")):
        assert parse_key(f"lora_unet_{path.replace('.', '_')}.alpha") == ("network", path, "alpha")
        assert parse_key(f"prior.{path}.lora_A.weight") == ("network", path, "lora_down.weight")


@pytest.mark.parametrize("module", ["self_attn.q_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2"])
def test_flat_names_find_every_module_of_a_tower(module: str) -> None:
    flat = f"lora_te_text_model_encoder_layers_11_{module.replace('.', '_')}.lora_up.weight"
    assert parse_key(flat) == ("text", f"encoder.layers.11.{module}", "lora_up.weight")


def test_loha_and_lokr() -> None:
    draw = torch.Generator().manual_seed(2)

    def factor(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw)

    a, b, c, d = factor(64, 2), factor(2, 64), factor(64, 2), factor(2, 64)
    loha = adapters_of(hada_w1_a=a, hada_w1_b=b, hada_w2_a=c, hada_w2_b=d, alpha=torch.tensor(1.0))
    assert_near(delta(*tensors_of(loha)), (a @ b) * (c @ d) * 0.5, 1e-6)
    one, two = factor(8, 8), factor(8, 8)
    assert_near(
        delta(*tensors_of(adapters_of(lokr_w1=one, lokr_w2=two, alpha=torch.tensor(1.0)))), torch.kron(one, two), 0
    )
    a, b = factor(8, 2), factor(2, 8)
    lokr = adapters_of(lokr_w1=one, lokr_w2_a=a, lokr_w2_b=b, alpha=torch.tensor(1.0))
    assert_near(delta(*tensors_of(lokr)), torch.kron(one, a @ b) * 0.5, 1e-6)
    path = "blocks.2.attention.to_q"
    for adapters in (loha, lokr):
        assert fit(adapters, {f"{path}.weight": torch.Size([64, 64])}).fitting
        assert fit(adapters, {f"{path}.weight": torch.Size([64, 32])}).misshaped


def tensors_of(adapters: dict[str, Adapter]) -> list[dict[str, Tensor]]:
    return [adapter.tensors for adapter in adapters.values()]


def test_onetrainers_convolutions() -> None:
    """A depthwise convolution's factors span its groups, and a LoHa's factors are kernels."""
    up, down = torch.randn(1, 2, 1, 1), torch.randn(2, 64, 3, 3)
    state = {"prior.blocks.0.depthwise.lora_up.weight": up, "prior.blocks.0.depthwise.lora_down.weight": down}
    prior = NETWORKS["prior"].perturbed()
    merged = merge_lora(prior.state_dict(), lora_from_state(state).network)
    change = merged["blocks.0.depthwise.weight"] - prior.state_dict()["blocks.0.depthwise.weight"]
    assert_near(change, (up.flatten(1) @ down.flatten(1)).view(64, 1, 3, 3), 1e-5)
    sizes = {"w1_a": (64, 2, 1, 1), "w1_b": (2, 16, 1, 1), "w2_a": (64, 2, 1, 1), "w2_b": (2, 16, 1, 1)}
    state = {f"prior.projection.hada_{name}": torch.ones(size) for name, size in sizes.items()}
    assert list(fit(lora_from_state(state).network, shapes(prior)).fitting) == ["projection"]


def test_magnitudes_of_dora_are_normalised() -> None:
    factors = {"lora_A__weight": torch.ones(2, 64), "lora_B__weight": torch.ones(64, 2)}
    prior = NETWORKS["prior"].perturbed()
    for name, shape in {
        "lora_magnitude_vector": (64,), "lora_magnitude_vector__default__weight": (64,), "dora_scale": (64, 1),
    }.items():  # fmt: skip
        adapters = adapters_of(**factors, **{name: torch.ones(shape)})
        assert adapters["blocks.2.attention.to_q"].tensors["dora_scale"].shape == (64, 1)
        assert fit(adapters, shapes(prior)).fitting
    assert fit(adapters_of(**factors, dora_scale=torch.ones(1, 64)), shapes(prior)).fitting
    assert fit(adapters_of(**factors, dora_scale=torch.ones(1, 32)), shapes(prior)).misshaped


def test_dora_equals_peft() -> None:
    peft = pytest.importorskip("peft", reason="computes the expected outputs")
    prior, inputs = NETWORKS["prior"].perturbed().requires_grad_(False), NETWORKS["prior"].inputs()
    state = {key: x.clone() for key, x in prior.state_dict().items()}
    options = peft.LoraConfig(r=2, lora_alpha=3, use_dora=True, target_modules=["to_q", "projection", "mapper"])
    peft.inject_adapter_in_model(options, prior)
    draw = torch.Generator().manual_seed(3)
    trained = {key: x for key, x in prior.state_dict().items() if "lora_" in key}
    for x in trained.values():
        x += torch.randn(x.shape, generator=draw) * 0.2
    lora = lora_from_state(trained, {"lora_adapter_metadata": json.dumps({"prior.lora_alpha": 3})})
    assert not lora.unknown and len(lora.network) == 5
    merged = NETWORKS["prior"].perturbed().requires_grad_(False)
    merged.load_state_dict(merge_lora(state, lora.network))
    assert_near(merged(*inputs), prior.eval()(*inputs), 1e-5)
    half = merge_lora(state, lora.network, 0.5)["projection.weight"]
    assert_near(half, (state["projection.weight"] + merged.state_dict()["projection.weight"]) / 2, 1e-6)


def test_oft_rotates_blocks_of_rows() -> None:
    blocks = torch.randn(8, 8, 8, generator=torch.Generator().manual_seed(3))
    state, key = NETWORKS["prior"].perturbed().state_dict(), "blocks.2.attention.to_q.weight"
    rotated = merge_lora(state, adapters_of(oft_blocks=blocks))[key]
    norms, before = rotated.unflatten(0, (8, 8)).norm(dim=1), state[key].unflatten(0, (8, 8)).norm(dim=1)
    assert_near(norms, before, 1e-5)
    assert (rotated - state[key]).abs().max() > 0.01
    limited = merge_lora(state, adapters_of(oft_blocks=blocks, alpha=torch.tensor(1e-3)))[key]
    assert 0 < (limited - state[key]).norm() < 3e-3 * state[key].norm()
    assert fit(adapters_of(oft_blocks=blocks[:7]), shapes(NETWORKS["prior"].build())).misshaped
    for other in ({"oft_blocks": blocks[None]}, {"oft_blocks": blocks, "rescale": torch.ones(64, 1)}):  # BOFT, rescaled
        assert not adapters_of(**other)


def test_differences_and_new_values() -> None:
    state = NETWORKS["prior"].perturbed().state_dict()
    keys = {
        "blocks.0.channelwise.2.gamma": "blocks.0.channelwise.2.gamma.diff",
        "projection.weight": "projection.w_norm",
        "projection.bias": "projection.b_norm",
        "out.1.bias": "out.1.diff_b",
    }
    file = {f"diffusion_model.{name}": torch.full_like(state[key], 2.0) for key, name in keys.items()}
    file["diffusion_model.out.1.set_weight"] = torch.full_like(state["out.1.weight"], 3.0)
    lora = lora_from_state(file)
    merged = merge_lora(state, lora.network, 0.5)
    assert not lora.unknown
    assert {key for key, x in merged.items() if not torch.equal(x, state[key])} == {*keys, "out.1.weight"}
    assert all(torch.equal(merged[key], state[key] + 1) for key in keys) and (merged["out.1.weight"] == 3).all()
    assert all(torch.equal(x, state[key]) for key, x in merge_lora(state, lora.network, 0.0).items())
    for key, size in (("out.1.diff", (32, 64)), ("out.1.diff_b", (1,)), ("projection.set_weight", (1,))):
        assert fit(lora_from_state({key: torch.ones(size)}).network, shapes(NETWORKS["prior"].build())).misshaped
    assert fit(lora_from_state({"blocks.0.diff_b": torch.ones(1)}).network, shapes(NETWORKS["prior"].build())).absent


@pytest.mark.parametrize("tensor", ["reshape_weight", "lokr_t2", "oft_blocks", "a1__weight", "diff"])
def test_modules_with_an_unsupported_tensor_are_left_out(tensor: str) -> None:
    adapters = {"lora_A__weight": torch.ones(2, 64), "lora_B__weight": torch.ones(64, 2), tensor: torch.ones(1)}
    lora = lora_from_state({f"prior.projection.{name.replace('__', '.')}": x for name, x in adapters.items()})
    assert not lora.network and len(lora.unknown) == 3


def test_keys_of_no_adapter_are_listed() -> None:
    state = FORMS["diffusers"].write(NETWORK, {})
    first = next(iter(state))
    state |= {
        "bundle_emb.<cat>.clip_g": torch.ones(2, 32),
        "some.weight": torch.ones(1),
        "prior.x.alpha": torch.ones(1),
    }
    state[first.replace("prior.", "unet.")] = torch.ones(1)  # the same tensor in another naming
    lora = lora_from_state(state)
    assert list(lora.embeddings) == ["bundle_emb.<cat>.clip_g"]
    assert set(lora.unknown) == {"some.weight", "prior.x.alpha", first.replace("prior.", "unet.")}
    assert_near(
        lora.network["blocks.2.attention.to_q"].tensors["lora_down.weight"], NETWORK["blocks.2.attention.to_q"][1], 0
    )


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({"prior.r": RANK, "prior.lora_alpha": 8}, 2.0),
        ({"prior.lora_alpha": 8, "prior.use_rslora": True}, 4.0),
        ({"prior.lora_alpha": 8, "prior.alpha_pattern": {"attention.to_q": 4}}, 1.0),
        ({"text_encoder.lora_alpha": 8}, 1.0),
        ({"unet.lora_alpha": 8}, 2.0),
        ({"text_encoder.lora_alpha": 8, "transformer.r": RANK, "transformer.lora_alpha": 2}, 0.5),
        ({"prior.note": "no configuration"}, 1.0),
    ],
)
def test_alpha_is_read_from_diffusers_metadata(config: dict[str, object], scale: float) -> None:
    state = FORMS["diffusers"].write(NETWORK, TEXT)
    lora = lora_from_state(state, {"lora_adapter_metadata": json.dumps(config)})
    up, down = NETWORK["blocks.2.attention.to_q"]
    assert_near(delta(lora.network["blocks.2.attention.to_q"].tensors), up @ down * (ALPHA / RANK) * scale, 1e-6)


def test_a_lora_of_another_width_is_rejected() -> None:
    wide = lora_from_state(FORMS["diffusers"].write(random_factors(attention_of_prior(128)), {})).network
    prior = NETWORKS["prior"].perturbed()
    found = fit(wide, shapes(prior))
    assert not found.fitting and len(found.misshaped) == 8
    assert all(fact in found.example for fact in ("blocks.2.attention.to_q", "64x64", "128x128"))
    with pytest.raises(ValueError, match="15 more"):
        merge_lora(prior.state_dict(), wide)


@pytest.mark.parametrize(
    "sizes",
    [
        {"lora_A__weight": (2, 64), "lora_B__weight": (64, 3)},
        {"hada_w1_a": (64, 2), "hada_w1_b": (2, 64), "hada_w2_a": (1, 2), "hada_w2_b": (2, 64)},
        {"hada_w1_a": (64, 2), "hada_w1_b": (2, 64), "hada_w2_a": (64, 2), "hada_w2_b": (2, 1)},
        {"lokr_w1": (8,), "lokr_w2": (8, 64)},
        {"lokr_w1_a": (8,), "lokr_w1_b": (8, 64), "lokr_w2": (64, 1)},
    ],
)
def test_factors_that_do_not_fit_each_other_are_rejected(sizes: dict[str, tuple[int, ...]]) -> None:
    """Also where torch would broadcast them to the shape of the weight."""
    adapters = adapters_of(**{name: torch.ones(size) for name, size in sizes.items()})
    prior = NETWORKS["prior"].perturbed()
    assert "factors" in fit(adapters, shapes(prior)).example
    with pytest.raises(ValueError, match="blocks.2.attention.to_q"):
        merge_lora(prior.state_dict(), adapters)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_merging_keeps_the_weights_dtype(dtype: torch.dtype) -> None:
    state = {key: x.to(dtype) for key, x in NETWORKS["prior"].perturbed().state_dict().items()}
    adapters = lora_from_state(FORMS["diffusers"].write(NETWORK, {})).network
    merged = merge_lora(state, adapters)
    key = "blocks.2.attention.to_q.weight"
    up, down = NETWORK["blocks.2.attention.to_q"]
    exact = state[key].float() + up @ down * (ALPHA / RANK)
    assert merged[key].dtype == dtype and torch.equal(merged[key].float(), exact.to(dtype).float())
    assert merged["projection.weight"] is state["projection.weight"]


@pytest.mark.parametrize("ending", ["safetensors", "pt", "bin"])
def test_a_file_is_read(tmp_path: Path, ending: str) -> None:
    path, state = tmp_path / f"lora.{ending}", FORMS["onetrainer kohya"].write(NETWORK, TEXT)
    save_file(state, path, {"author": "me"}) if ending == "safetensors" else torch.save(state, path)
    lora = read_lora(path)
    assert lora.network.keys() == NETWORK.keys() and lora.text.keys() == TEXT.keys()


def test_alphas_that_are_plain_numbers(tmp_path: Path) -> None:
    state = FORMS["kohya"].write(NETWORK, TEXT)
    torch.save({key: x.item() if key.endswith(".alpha") else x for key, x in state.items()}, tmp_path / "x.pt")
    adapter = read_lora(tmp_path / "x.pt").network["blocks.2.attention.to_q"]
    assert adapter.tensors["alpha"] == ALPHA
    torch.save(dict.fromkeys(state, 10**400), tmp_path / "huge.pt")
    with pytest.raises(ValueError, match=r"huge\.pt"):
        read_weight_file(tmp_path / "huge.pt")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("name", FORMS)
def test_wrappers_prefixes(name: str, prefix: str) -> None:
    state = FORMS[name].write(NETWORK, TEXT)
    plain, wrapped = lora_from_state(state), lora_from_state({prefix + key: x for key, x in state.items()})
    assert (wrapped.network.keys(), wrapped.text.keys()) == (plain.network.keys(), plain.text.keys())
    assert not wrapped.unknown


def test_prefixes_inside_pefts_keys() -> None:
    key = "base_model.model._orig_mod.blocks.2.attention.to_q.lora_{}.weight"
    up, down = NETWORK["blocks.2.attention.to_q"]
    lora = lora_from_state({key.format("A"): down, key.format("B"): up}, config={"r": RANK, "lora_alpha": 3 * RANK})
    assert_near(delta(lora.network["blocks.2.attention.to_q"].tensors), 3 * up @ down, 1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("end", [".alpha", ".lora_up.weight"])
def test_values_that_are_not_finite_are_rejected(end: str, value: float) -> None:
    state = FORMS["kohya"].write(NETWORK, TEXT)
    key = next(key for key in state if key.endswith(end))
    with pytest.raises(ValueError, match=key):
        lora_from_state({**state, key: torch.full_like(state[key], value)})


def test_integers_are_no_adapters() -> None:
    state = {key: x.to(torch.int8) for key, x in FORMS["kohya"].write(NETWORK, {}).items()}
    lora = lora_from_state(state)
    assert not lora.network and len(lora.unknown) == len(state)


def test_files_without_adapters_are_rejected(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"blocks.0.weight": torch.ones(1)}, path)
    with pytest.raises(ValueError, match=r"x\.safetensors.*blocks\.0\.weight"):
        read_lora(path)
    with pytest.raises(ValueError, match=r"y\.safetensors"):
        read_lora(tmp_path / "y.safetensors")


@pytest.mark.parametrize(
    ("key", "family"),
    [
        ("lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.lora_up.weight", "Stable Diffusion or SDXL"),
        ("unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight", "Stable Diffusion or SDXL"),
        ("lora_prior_unet_down_blocks_0_2_attention_attn_to_q.lora_down.weight", "Stable Cascade"),
        ("unet.down_blocks.0.2.attention.to_q.lora_A.weight", "Würstchen's decoder or Stable Cascade"),
        ("lora_prior_unet_blocks_2_attention_to_q.lora_down.weight", "Würstchen's prior"),
        ("transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight", "Flux"),
    ],
)
def test_the_model_family_is_recognised(key: str, family: str) -> None:
    assert lora_from_state({key: torch.ones(1, 1)}).family() == family
