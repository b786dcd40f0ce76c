"""ComfyUI's quantised files are restored as its layers would compute with them; `tests/host` compares with ComfyUI."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.layouts import clip_of_transformers, comfyui, original, random_state
from helpers.networks import PRIOR
from helpers.quantised import encoded, int8, rotation
from safetensors.torch import load_file, save_file
from torch import Tensor

from wuerstchen_core.checkpoints import describe, load_prior, read_part
from wuerstchen_core.checkpoints.convert import convert
from wuerstchen_core.checkpoints.convrot import hadamard
from wuerstchen_core.checkpoints.open import open_source
from wuerstchen_core.models.prior import Prior

State = dict[str, Tensor]
LAYERS = ("blocks.2.attention.to_q", "blocks.2.attention.to_v", "cond_mapper.0", "blocks.0.channelwise.0")


@pytest.fixture(scope="module")
def plain() -> State:
    return random_state(Prior(PRIOR))


def quantised(plain: State, form: str, in_header: bool = False) -> tuple[State, dict[str, str], State]:
    """Returns the tensors and the metadata of a quantised file, and the weights that it stands for."""
    state, expected, layers = dict(plain), dict(plain), {}
    for layer in LAYERS:
        key, weight = f"{layer}.weight", plain[f"{layer}.weight"]
        config: dict[str, Any] = {"format": form}
        if form.startswith("float8"):
            scale = weight.abs().max() / 300
            stored = (weight / scale).to(getattr(torch, form))
            expected[key] = stored.float() * scale
        else:
            group = {"int8_tensorwise, rotated": 16, "int8_tensorwise, nested": 4}.get(form, 0)
            stored, scale = int8(weight, group, per_row=form != "int8_tensorwise, one scale")
            rotated = {"convrot": True, "convrot_groupsize": group} if group else {}
            config = {"format": "int8_tensorwise", **({"params": rotated} if "nested" in form else rotated)}
            expected[key] = stored.float() * scale
            if group:
                expected[key] = (expected[key].unflatten(1, (-1, group)) @ rotation(group)).flatten(1)
        state |= {key: stored, f"{layer}.weight_scale": scale, f"{layer}.input_scale": torch.tensor(1.0)}
        layers[layer] = config
    if in_header:
        return state, {"_quantization_metadata": json.dumps({"layers": layers})}, expected
    return state | {f"{layer}.comfy_quant": encoded(config) for layer, config in layers.items()}, {}, expected


FORMS = (
    "float8_e4m3fn", "float8_e5m2", "int8_tensorwise", "int8_tensorwise, one scale", "int8_tensorwise, rotated",
    "int8_tensorwise, nested",
)  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("in_header", [False, True])
def test_quantised_files_are_restored(plain: State, tmp_path: Path, form: str, in_header: bool) -> None:
    state, metadata, expected = quantised(plain, form, in_header)
    save_file(state, tmp_path / "file.safetensors", metadata)
    found = read_part(tmp_path / "file.safetensors", "prior").state_dict
    assert found.keys() == plain.keys()
    for key, x in found.items():
        torch.testing.assert_close(x, expected[key], rtol=1e-6, atol=1e-6)
    error = max((found[f"{layer}.weight"] - plain[f"{layer}.weight"]).abs().max() for layer in LAYERS)
    assert 0 < error < (0.5 if "e5m2" in form else 0.25)
    [info] = describe(tmp_path / "file.safetensors").parts
    kind = {"float8_e4m3fn": "fp8", "float8_e5m2": "fp8_e5m2"}.get(form, "int8")
    assert info.dtype == f"fp32 and {kind} (scaled)" or info.dtype == f"{kind} (scaled) and fp32"
    load_prior(tmp_path / "file.safetensors")
    in_int8 = load_prior(tmp_path / "file.safetensors", dtype="int8")
    for layer in LAYERS:
        weight, _ = in_int8.get_submodule(layer).weights(torch.zeros(()))
        largest = expected[f"{layer}.weight"].abs().amax(1, keepdim=True)
        assert ((weight - expected[f"{layer}.weight"]).abs() <= 0.505 * largest / 127).all()


def test_quantised_files_of_comfyuis_modelsave_are_converted(plain: State, tmp_path: Path) -> None:
    state, _, expected = quantised(plain, "int8_tensorwise, rotated")
    save_file(comfyui(state), tmp_path / "file.safetensors")
    [output] = convert([tmp_path / "file.safetensors"], tmp_path / "out.safetensors", dtype="fp32")
    for key, x in read_part(output, "prior").state_dict.items():
        torch.testing.assert_close(x, expected[key], rtol=1e-6, atol=1e-6)


def test_quantised_shards(plain: State, tmp_path: Path) -> None:
    state, metadata, expected = quantised(plain, "int8_tensorwise, rotated", in_header=True)
    keys = list(state)
    shards = {"one.safetensors": keys[::2], "two.safetensors": keys[1::2]}
    for name, own in shards.items():
        save_file({key: state[key] for key in own}, tmp_path / name, metadata)
    index = {key: name for name, own in shards.items() for key in own}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    for key, x in read_part(tmp_path, "prior").state_dict.items():
        torch.testing.assert_close(x, expected[key], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_is_that_of_the_other_weights(plain: State, tmp_path: Path, dtype: torch.dtype) -> None:
    state, _, expected = quantised(plain, "int8_tensorwise, rotated")
    scales = {key for key in state if key.endswith("scale")}
    half = {key: x.to(dtype) if x.is_floating_point() and key not in scales else x for key, x in state.items()}
    save_file(half, tmp_path / "file.safetensors")
    found = read_part(tmp_path / "file.safetensors", "prior").state_dict
    assert {x.dtype for x in found.values()} == {dtype}
    key = f"{LAYERS[0]}.weight"
    assert (found[key].float() - expected[key]).abs().max() <= torch.finfo(dtype).eps * expected[key].abs().max()


def test_the_matrix_of_convrot() -> None:
    for size in (4, 16, 64, 256):
        torch.testing.assert_close(hadamard(size), rotation(size), rtol=0, atol=0)
        torch.testing.assert_close(hadamard(size) @ hadamard(size), torch.eye(size), rtol=0, atol=1e-6)


KEY = LAYERS[0]
ROTATED = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 16}
DAMAGES = {
    "nvfp4": {f"{KEY}.comfy_quant": encoded({"format": "nvfp4"})},
    "mxfp8": {f"{KEY}.comfy_quant": encoded({"format": "mxfp8"})},
    "convrot_w4a4": {f"{KEY}.comfy_quant": encoded({"format": "convrot_w4a4"})},
    "asym_w4a8_int8": {f"{KEY}.comfy_quant": encoded({"format": "asym_w4a8_int8"})},
    "comfy_quant is damaged": {f"{KEY}.comfy_quant": torch.zeros(7, dtype=torch.uint8)},
    "scale is missing": {f"{KEY}.weight_scale": None},
    rf"scale of {KEY}.weight is \[3\]": {f"{KEY}.weight_scale": torch.ones(3)},
    rf"scale of {KEY}.weight is \[1, 64\]": {f"{KEY}.weight_scale": torch.ones(1, 64)},
    rf"scale of {KEY}.weight is \[64, 64\]": {f"{KEY}.weight_scale": torch.ones(64, 64)},
    f"{KEY}.weight is not finite": {f"{KEY}.weight_scale": torch.tensor([[1.0]] * 63 + [[float("nan")]])},
    "cond_mapper.0.weight is stored in fp8": {
        "cond_mapper.0.weight": torch.ones(64, 32).to(torch.float8_e4m3fn),
        "cond_mapper.0.weight_scale": None,
        "cond_mapper.0.comfy_quant": None,
    },
    "cond_mapper.9.weight_scale has no weight": {"cond_mapper.9.weight_scale": torch.ones(64, 1)},
    "cond_mapper.9.scale_weight has no weight": {"cond_mapper.9.scale_weight": torch.ones(())},
    "cond_mapper.9.comfy_quant has no weight": {"cond_mapper.9.comfy_quant": encoded({"format": "int8_tensorwise"})},
    "groups of 96": {
        f"{KEY}.comfy_quant": encoded({"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 96})
    },
    "groups of 256": {f"{KEY}.comfy_quant": encoded({"format": "int8_tensorwise", "convrot": True})},
    "but its quantisation is": {f"{KEY}.comfy_quant": encoded({"format": "float8_e4m3fn"})},
    "int8 without": {f"{KEY}.comfy_quant": None},
    "bitsandbytes": {f"{KEY}.weight.absmax": torch.ones(4), f"{KEY}.weight.quant_map": torch.ones(16)},
    "quanto": {f"{KEY}.weight": None, f"{KEY}.weight._data": torch.ones(64, 64, dtype=torch.int8)},
    "GPTQ": {f"{KEY}.weight": None, f"{KEY}.qweight": torch.ones(8, 64, dtype=torch.int32)},
}


@pytest.mark.parametrize("fact", DAMAGES)
def test_other_formats_and_damage_are_refused_by_name(plain: State, tmp_path: Path, fact: str) -> None:
    state, _, _ = quantised(plain, "int8_tensorwise")
    changed = {key: x for key, x in {**state, **DAMAGES[fact]}.items() if x is not None}
    save_file(changed, tmp_path / "file.safetensors")
    for run in (describe, load_prior, lambda file: convert([file], tmp_path / "out.safetensors")):
        with pytest.raises(ValueError, match=fact) as raised:
            run(tmp_path / "file.safetensors")
        assert "\n" not in str(raised.value) and "file.safetensors" in str(raised.value)
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("form", FORMS)
def test_quantised_files_are_kept_as_they_are(plain: State, tmp_path: Path, form: str) -> None:
    state, _, _ = quantised(plain, form)
    save_file(state, tmp_path / "file.safetensors")
    [output] = convert([tmp_path / "file.safetensors"], tmp_path / "kept.safetensors")
    kept = load_file(output)
    for layer in LAYERS:
        for name in ("weight", "weight_scale", "comfy_quant"):
            assert_same_bytes(kept[f"prior.{layer}.{name}"], state[f"{layer}.{name}"])


def assert_same_bytes(one: Tensor, other: Tensor) -> None:
    assert one.dtype == other.dtype and one.shape == other.shape
    assert one.reshape(-1).view(torch.uint8).equal(other.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize("per_row", [True, False])
def test_packed_projections_are_kept(plain: State, tmp_path: Path, per_row: bool) -> None:
    """The thirds of the original prior's, and the whole of a text tower's q, k and v."""
    prior, start = original(plain), "blocks.2.attention.attn.in_proj_"
    stored, scale = int8(prior[f"{start}weight"], 16, per_row)
    prior |= {f"{start}weight": stored, f"{start}weight_scale": scale, f"{start}comfy_quant": encoded(ROTATED)}
    save_file(prior, tmp_path / "prior.safetensors")
    [output] = convert([tmp_path / "prior.safetensors"], tmp_path / "kept.safetensors")
    kept = load_file(output)
    for i, name in enumerate("qkv"):
        assert_same_bytes(kept[f"prior.blocks.2.attention.to_{name}.weight"], stored.chunk(3)[i])
        third = scale.chunk(3)[i] if per_row else scale
        assert_same_bytes(kept[f"prior.blocks.2.attention.to_{name}.weight_scale"], third)

    tower, start = clip_of_transformers(64, 1, vocab_size=100), "text_model.encoder.layers.0.self_attn."
    trio = [int8(tower[f"{start}{name}_proj.weight"], 16, per_row) for name in "qkv"]
    for name, (stored, scale) in zip("qkv", trio, strict=True):
        stem = f"{start}{name}_proj."
        tower |= {f"{stem}weight": stored, f"{stem}weight_scale": scale, f"{stem}comfy_quant": encoded(ROTATED)}
    save_file(tower, tmp_path / "tower.safetensors")
    [output] = convert([tmp_path / "tower.safetensors"], tmp_path / "kept", version="v2")
    kept, start = load_file(output), "transformer.resblocks.0.attn.in_proj_"
    assert_same_bytes(kept[f"{start}weight"], torch.cat([stored for stored, _ in trio]))
    assert_same_bytes(kept[f"{start}weight_scale"], torch.cat([scale.expand(64, 1) for _, scale in trio]))
    assert_same_bytes(kept[f"{start}comfy_quant"], encoded(ROTATED))
    whole, parts = (
        read_part(file, "prior_text_encoder").state_dict for file in (output, tmp_path / "tower.safetensors")
    )
    torch.testing.assert_close(whole, parts, rtol=0, atol=0)


def test_a_damaged_header_is_refused(plain: State, tmp_path: Path) -> None:
    for text in ("{", "[]", '{"layers": 3}', "[" * 100_000):
        save_file(plain, tmp_path / "file.safetensors", {"_quantization_metadata": text})
        with pytest.raises(ValueError, match=r"_quantization_metadata.*file\.safetensors"):
            open_source(tmp_path / "file.safetensors")
