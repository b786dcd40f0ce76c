"""Tests the files in int8 that are written; `tests/host` reads them with ComfyUI's layers."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.layouts import random_state
from helpers.networks import NETWORKS, PRIOR
from helpers.quantised import encoded, int8, rotation
from safetensors.torch import load_file, save_file
from torch import Tensor

from wuerstchen_core.checkpoints import Part, describe, load_prior, read_part, save_bundle
from wuerstchen_core.checkpoints.build import build_part
from wuerstchen_core.checkpoints.components import Params, component
from wuerstchen_core.checkpoints.convert import convert
from wuerstchen_core.checkpoints.lazy import LazyTensor
from wuerstchen_core.checkpoints.open import open_part
from wuerstchen_core.checkpoints.quant import FP8, INT8, is_matrix, quantize
from wuerstchen_core.checkpoints.verify import expected_tensors
from wuerstchen_core.models.decoder import DecoderParams
from wuerstchen_core.models.image_encoder import EFFICIENTNET_V2_L, ImageEncoderParams
from wuerstchen_core.models.prior import V1, Prior, PriorParams
from wuerstchen_core.models.text_encoder import CLIP_BIGG, CLIP_H
from wuerstchen_core.models.token_decoder import TokenDecoderParams
from wuerstchen_core.models.vqgan import VQGANParams

State = dict[str, Tensor]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": FP8, "int8": INT8}
RELEASED: dict[str, dict[str, Params]] = {
    "v1": {
        "prior": PriorParams(**V1),
        "token_decoder": TokenDecoderParams(),
        "vqgan": VQGANParams(),
        "image_encoder": ImageEncoderParams(stages=EFFICIENTNET_V2_L),
        "text_encoder": CLIP_H,
    },
    "v2": {
        "prior": PriorParams(),
        "decoder": DecoderParams(),
        "vqgan": VQGANParams(),
        "image_encoder": ImageEncoderParams(),
        "prior_text_encoder": CLIP_BIGG,
        "decoder_text_encoder": CLIP_H,
    },
}


@pytest.fixture(scope="module")
def plain() -> State:
    return random_state(Prior(replace(PRIOR, c_cond=48)))


# Files


def test_an_int8_file(plain: State, tmp_path: Path) -> None:
    """Large matrices are rotated in the largest groups and rounded with a scale for each row; others are in bf16."""
    save_file(plain, tmp_path / "prior.safetensors")
    [output] = convert([tmp_path / "prior.safetensors"], tmp_path / "int8", dtype="int8")
    stored, restored = load_file(output), read_part(output, "prior").state_dict
    matrices = {key for key, x in plain.items() if is_matrix(key, x)}
    assert {key for key, x in stored.items() if x.dtype == INT8} == matrices
    assert "cond_mapper.2.weight" in matrices and "blocks.0.depthwise.weight" not in matrices
    assert len(stored) == len(plain) + 2 * len(matrices) and restored.keys() == plain.keys()
    for key, x in plain.items():
        if key not in matrices:
            assert stored[key].equal(x.bfloat16()) and restored[key].equal(x.bfloat16())
            continue
        stem = key.removesuffix("weight")
        scale, config = stored[f"{stem}weight_scale"], json.loads(bytes(stored[f"{stem}comfy_quant"].tolist()))
        group = {48: 16, 64: 64, 128: 64, 256: 256}[x.shape[1]]
        assert config == {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": group}
        assert scale.dtype == torch.float32 and scale.shape == (len(x), 1)
        rotated = (x.unflatten(1, (-1, group)) @ rotation(group)).flatten(1)
        assert ((stored[key] * scale - rotated).abs() <= scale * 0.5001).all()
        assert (stored[key].abs().amax(1) == 127).all()
        torch.testing.assert_close(restored[key].float(), x, rtol=0.01, atol=0.05)


def test_widths_that_no_group_divides_are_not_rotated() -> None:
    x = torch.randn(80, 66, generator=torch.Generator().manual_seed(0))
    x[3] = 0
    entries = {key: entry.load() for key, entry in quantize("a.weight", x, INT8).items()}
    assert entries["a.comfy_quant"].equal(encoded({"format": "int8_tensorwise"}))
    expected, scale = int8(x, 0)
    assert entries["a.weight"][4:].equal(expected[4:]) and entries["a.weight_scale"][4:].equal(scale[4:])
    assert not entries["a.weight"][3].any() and entries["a.weight_scale"][3] > 0


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp8", "int8"])
def test_sources_of_every_dtype_become_int8(plain: State, tmp_path: Path, dtype: str) -> None:
    save_file(plain, tmp_path / "prior.safetensors")
    [source] = convert([tmp_path / "prior.safetensors"], tmp_path / "source.safetensors", dtype=dtype)
    [output] = convert([source], tmp_path / "int8.safetensors", dtype="int8")
    assert [part.dtype for part in describe(output).parts] == ["bf16 and int8 (scaled)"]
    before, after = (read_part(file, "prior").state_dict for file in (source, output))
    for key, x in before.items():
        assert (after[key].float() - x.float()).norm() <= 0.012 * x.float().norm(), key
    [back] = convert([output], tmp_path / "fp8.safetensors", dtype="fp8")
    assert [part.dtype for part in describe(back).parts] == ["bf16 and fp8 (scaled)"]
    load_prior(back)


@pytest.mark.parametrize("dtype", [FP8, INT8])
def test_packed_projections(tmp_path: Path, dtype: torch.dtype) -> None:
    """Those of v1's Stage B, one matrix of query, key and value."""
    network = NETWORKS["token_decoder"].perturbed()
    save_bundle(tmp_path / "b.safetensors", {"token_decoder": network}, {}, dtype)
    stored, restored = load_file(tmp_path / "b.safetensors"), read_part(tmp_path / "b.safetensors", "token_decoder")
    packed = [(key, x) for key, x in network.state_dict().items() if key.endswith("in_proj_weight")]
    assert packed
    for key, x in packed:
        stem = f"token_decoder.{key.removesuffix('weight')}"
        assert (
            stored[f"{stem}weight"].dtype == dtype
            and f"{stem}weight_scale" in stored
            and f"{stem}comfy_quant" in stored
        )
        error = (restored.state_dict[key].float() - x).norm() / x.norm()
        assert 0 < error < (0.01 if dtype == INT8 else 0.04)


@pytest.mark.parametrize("dtype", [None, INT8, FP8, torch.float32])
def test_a_network_with_int8_layers_is_saved(plain: State, tmp_path: Path, dtype: torch.dtype | None) -> None:
    """Its layers have a scale for each row and no JSON, and are not rotated."""
    state, expected, layer = dict(plain), dict(plain), "blocks.2.attention.to_q"
    stored, scale = int8(plain[f"{layer}.weight"], 0)
    state |= {f"{layer}.weight": stored, f"{layer}.weight_scale": scale}
    expected[f"{layer}.weight"] = stored * scale
    save_bundle(tmp_path / "saved.safetensors", {"prior": Part("prior", replace(PRIOR, c_cond=48), state)}, {}, dtype)
    found = read_part(tmp_path / "saved.safetensors", "prior").state_dict
    torch.testing.assert_close(
        {key: x.float() for key, x in found.items()}, expected, rtol=0.07, atol=0.07 if dtype in (FP8, INT8) else 1e-7
    )
    if dtype in (None, INT8):
        saved = load_file(tmp_path / "saved.safetensors")
        assert saved[f"prior.{layer}.weight"].equal(stored)
        assert saved[f"prior.{layer}.weight_scale"].equal(scale)
        assert saved[f"prior.{layer}.comfy_quant"].equal(encoded({"format": "int8_tensorwise"}))


@pytest.mark.parametrize("name", ["prior", "token_decoder"])
def test_int8_networks_load_from_what_they_saved(tmp_path: Path, name: str) -> None:
    """Also v1's Stage B, which has separate projections in int8 and packed ones in files."""
    network = NETWORKS[name].perturbed()
    before, start = tmp_path / "before.safetensors", tmp_path / "start.safetensors"
    save_bundle(start, {name: network}, {})
    first = build_part(open_part(start, name), dtype=INT8)
    save_bundle(before, {name: first}, {})
    part = open_part(before, name)
    assert part.state_dict.keys() == network.state_dict().keys()
    again = build_part(part, dtype=INT8).state_dict()
    for key, x in first.state_dict().items():
        assert again[key].dtype == x.dtype and again[key].equal(x), key


# Sizes


@pytest.fixture(scope="module")
def sizes() -> dict[str, dict[str, int]]:
    """Bytes of a complete model's tensors, by release and dtype."""
    return {
        release: {
            name: sum(_bytes(part, params, dtype) for part, params in parts.items()) for name, dtype in DTYPES.items()
        }
        for release, parts in RELEASED.items()
    }


def _bytes(part: str, params: Params, dtype: torch.dtype) -> int:
    shapes = expected_tensors(component(part).network, params)
    dtypes = {True: torch.float32, False: torch.int64}
    tensors = {
        key: LazyTensor(tuple(shape), dtypes[is_float], torch.Tensor) for key, (shape, is_float) in shapes.items()
    }
    return sum(entry.nbytes for key, x in tensors.items() for entry in quantize(key, x, dtype).values())


def test_the_released_models_in_8_bits_are_small(sizes: dict[str, dict[str, int]]) -> None:
    assert sizes["v2"]["int8"] < 0.256 * sizes["v2"]["fp32"]  # at most 0.28
    assert sizes["v1"]["int8"] < 0.268 * sizes["v1"]["fp32"]


def test_the_sizes_on_the_page(sizes: dict[str, dict[str, int]]) -> None:
    text = (Path(__file__).parents[2] / "docs" / "weights.md").read_text("utf-8")
    for release, found in sizes.items():
        [row] = re.findall(rf"^\| complete {release} \|(.*)\|$", text, re.MULTILINE)
        assert [float(cell.split()[0]) for cell in row.split("|")] == [round(x / 1e9, 2) for x in found.values()]
