"""ComfyUI's quantised files are restored as its layers would compute with them; `tests/host` compares with ComfyUI."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.layouts import comfyui, random_state
from helpers.networks import PRIOR
from safetensors.torch import save_file
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


def encoded(config: dict[str, Any]) -> Tensor:
    return torch.tensor(list(json.dumps(config).encode()), dtype=torch.uint8)


def rotation(size: int) -> Tensor:
    """Returns ConvRot's matrix, element by element: a sign for each pair of base-4 digits that add up to 3."""
    digits = range((size.bit_length() - 1) // 2)
    signs = [
        [(-1) ** sum((i >> 2 * d) % 4 + (j >> 2 * d) % 4 == 3 for d in digits) for j in range(size)]
        for i in range(size)
    ]
    return torch.tensor(signs, dtype=torch.float32) / size**0.5


def int8(weight: Tensor, group: int, per_row: bool = True) -> tuple[Tensor, Tensor]:
    """Quantises as ComfyUI does: rotated in groups of `group` (0: not), with a scale for each row or one for all."""
    if group:
        weight = (weight.unflatten(1, (-1, group)) @ rotation(group).T).flatten(1)
    scale = (weight.abs().amax(1, keepdim=True) if per_row else weight.abs().max()) / 127
    return (weight / scale).round().clamp(-127, 127).to(torch.int8), scale


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
DAMAGES = {
    "nvfp4": {f"{KEY}.comfy_quant": encoded({"format": "nvfp4"})},
    "mxfp8": {f"{KEY}.comfy_quant": encoded({"format": "mxfp8"})},
    "convrot_w4a4": {f"{KEY}.comfy_quant": encoded({"format": "convrot_w4a4"})},
    "asym_w4a8_int8": {f"{KEY}.comfy_quant": encoded({"format": "asym_w4a8_int8"})},
    "comfy_quant is damaged": {f"{KEY}.comfy_quant": torch.zeros(7, dtype=torch.uint8)},
    "scale is missing": {f"{KEY}.weight_scale": None},
    "has 3 numbers": {f"{KEY}.weight_scale": torch.ones(3)},
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


def test_a_damaged_header_is_refused(plain: State, tmp_path: Path) -> None:
    for text in ("{", "[]", '{"layers": 3}'):
        save_file(plain, tmp_path / "file.safetensors", {"_quantization_metadata": text})
        with pytest.raises(ValueError, match=r"_quantization_metadata.*file\.safetensors"):
            open_source(tmp_path / "file.safetensors")
