"""Tests that every published layout, at tiny sizes, loads strictly."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from helpers.layouts import State, comfyui, encoder_state, original, random_state, vqgan_of_diffusers, write_folder
from helpers.networks import DECODER, PRIOR, VQ
from safetensors.torch import save_file
from torch import nn

from wuerstchen_core.checkpoints import (
    build_part,
    load_decoder,
    load_image_encoder,
    load_prior,
    load_text_encoder,
    load_vqgan,
    read_part,
)
from wuerstchen_core.models.decoder import Decoder
from wuerstchen_core.models.prior import Prior, PriorParams
from wuerstchen_core.models.text_encoder import TextEncoder, TextEncoderParams
from wuerstchen_core.models.vqgan import VQGAN

TEXT = TextEncoderParams(width=64, heads=1, layers=1, vocab_size=20)


@pytest.fixture(scope="module")
def prior() -> State:
    return random_state(Prior(PRIOR))


@pytest.fixture(scope="module")
def decoder() -> State:
    return random_state(Decoder(DECODER))


@pytest.fixture(scope="module")
def vqgan() -> State:
    return random_state(VQGAN(VQ))


def assert_weights(network: nn.Module, state: State) -> None:
    """Checks that a network has these weights and is ready for inference."""
    loaded = network.state_dict()
    assert loaded.keys() == state.keys()
    assert all(loaded[key].equal(x) for key, x in state.items())
    tensors = [*network.parameters(), *network.buffers()]
    assert not network.training and not any(x.requires_grad or x.is_meta for x in tensors)


@pytest.mark.parametrize("key", ["state_dict", "ema_state_dict", "state_dict_ema", None])
def test_original_prior(prior: State, tmp_path: Path, key: str | None) -> None:
    path = tmp_path / "model_v2_stage_c.pt"
    torch.save(original(prior) if key is None else {key: original(prior), "iter": 3, "metrics": {"loss": 0.1}}, path)
    network = load_prior(path)
    assert network.params == PRIOR
    assert_weights(network, prior)


def test_ema_weights_come_before_raw_ones(prior: State, tmp_path: Path) -> None:
    path = tmp_path / "training.pt"
    raw = {key: x + 1 for key, x in prior.items()}
    torch.save({"state_dict": raw, "ema_state_dict": original(prior), "optimizer_state_dict": {"state": {}}}, path)
    assert_weights(load_prior(path), prior)


def test_file_in_pytorchs_older_format(prior: State, tmp_path: Path) -> None:
    torch.save(prior, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    assert_weights(load_prior(tmp_path / "old.bin"), prior)


def test_pytorch_file_under_another_formats_name(prior: State, tmp_path: Path) -> None:
    torch.save({"state_dict": prior}, tmp_path / "prior.safetensors")
    assert_weights(load_prior(tmp_path / "prior.safetensors"), prior)


def test_text_width_of_a_prior_is_inferred(tmp_path: Path) -> None:
    for width in (1024, 1280):
        state = random_state(Prior(PriorParams(c=64, c_cond=width, depth=1, nhead=1)))
        save_file(state, tmp_path / "prior.safetensors")
        assert load_prior(tmp_path / "prior.safetensors").params.c_cond == width


def test_original_stage_b_gives_decoder_and_image_encoder(decoder: State, tmp_path: Path) -> None:
    path = tmp_path / "model_v2_stage_b.pt"
    encoder = encoder_state()
    torch.save({"state_dict": original(decoder), "effnet_state_dict": encoder}, path)
    network = load_decoder(path)
    assert network.params == DECODER
    assert_weights(network, decoder)
    assert_weights(load_image_encoder(path), encoder)


def test_original_vqgan_with_its_training_state(vqgan: State, tmp_path: Path) -> None:
    path = tmp_path / "vqgan_f4_v1_500k.pt"
    torch.save({"state_dict": vqgan, "discriminator": {"x": torch.zeros(1)}, "optimizer": {"state": {0: 1.0}}}, path)
    network = load_vqgan(path)
    assert network.params == VQ
    assert_weights(network, vqgan)


@pytest.fixture(scope="module")
def towers() -> dict[str, State]:
    """Two different text towers in open_clip's names."""
    return {stage: random_state(TextEncoder(TEXT), seed) for seed, stage in enumerate(("prior", "decoder"))}


def test_diffusers_pipelines(
    prior: State, decoder: State, vqgan: State, towers: dict[str, State], tmp_path: Path
) -> None:
    write_folder(tmp_path / "prior" / "prior", prior, {"nhead": 1, "_class_name": "WuerstchenPrior"})
    write_folder(tmp_path / "prior" / "text_encoder", towers["prior"], {}, "model")
    write_folder(tmp_path / "main" / "decoder", decoder, {"nhead": [-1, 1, 1]})
    write_folder(tmp_path / "main" / "vqgan", vqgan_of_diffusers(vqgan), {"scale_factor": 0.5})
    write_folder(tmp_path / "main" / "text_encoder", towers["decoder"], {}, "model")
    assert_weights(load_prior(tmp_path / "prior"), prior)
    assert_weights(load_prior(tmp_path / "prior" / "prior"), prior)
    assert_weights(load_prior(tmp_path / "prior" / "prior" / "diffusion_pytorch_model.safetensors"), prior)
    assert_weights(load_decoder(tmp_path / "main"), decoder)
    assert_weights(load_vqgan(tmp_path / "main"), vqgan)
    assert load_vqgan(tmp_path / "main").params.scale_factor == 0.5
    assert_weights(load_text_encoder(tmp_path / "prior"), towers["prior"])
    assert_weights(load_text_encoder(tmp_path / "main", which="decoder"), towers["decoder"])
    with pytest.raises(ValueError, match="no prior_text_encoder; .* decoder, vqgan, decoder_text_encoder"):
        load_text_encoder(tmp_path / "main")
    with pytest.raises(ValueError, match="no decoder; "):
        load_decoder(tmp_path / "prior")


def test_combined_diffusers_pipeline(prior: State, towers: dict[str, State], tmp_path: Path) -> None:
    write_folder(tmp_path / "prior_prior", prior, {})
    write_folder(tmp_path / "prior_text_encoder", towers["prior"], {}, "model")
    write_folder(tmp_path / "text_encoder", towers["decoder"], {}, "model")
    assert_weights(load_prior(tmp_path), prior)
    for stage in ("prior", "decoder"):
        assert_weights(load_text_encoder(tmp_path, which=stage), towers[stage])


def test_sharded_folder(prior: State, tmp_path: Path) -> None:
    keys = list(prior)
    shards = {"a.safetensors": keys[::2], "b.safetensors": keys[1::2]}
    for name, own in shards.items():
        save_file({key: prior[key] for key in own}, tmp_path / name)
    index = {"metadata": {}, "weight_map": {key: name for name, own in shards.items() for key in own}}
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    assert_weights(load_prior(tmp_path), prior)
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(ValueError, match=r"index\.json.*b\.safetensors"):
        load_prior(tmp_path)


def test_component_in_pytorch_format(vqgan: State, tmp_path: Path) -> None:
    torch.save(vqgan, tmp_path / "diffusion_pytorch_model.bin")
    assert_weights(load_vqgan(tmp_path), vqgan)


def test_model_saved_by_comfyui(prior: State, tmp_path: Path) -> None:
    save_file(comfyui(prior) | {"model_sampling.sigmas": torch.zeros(3)}, tmp_path / "saved.safetensors")
    assert_weights(load_prior(tmp_path / "saved.safetensors"), prior)


def test_dtype_is_the_files_unless_given(vqgan: State, tmp_path: Path) -> None:
    halves = {key: x.half() if x.is_floating_point() else x for key, x in vqgan.items()}
    save_file(halves, tmp_path / "vqgan.safetensors")
    for dtype, expected in ((None, torch.float16), (torch.bfloat16, torch.bfloat16)):
        network = load_vqgan(tmp_path / "vqgan.safetensors", dtype=dtype)
        assert {x.dtype for x in network.state_dict().values()} == {expected, torch.int64}


def test_weights_are_read_one_by_one(tmp_path: Path) -> None:
    """Loading 100 MB of weights in bf16 takes memory for 50 MB and a few tensors."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        pytest.skip("this system has no /proc to read memory from")

    def resident() -> float:
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

    shapes = Prior(PriorParams(c=512, nhead=8, depth=8), device="meta").state_dict()
    save_file({key: torch.empty(x.shape) for key, x in shapes.items()}, tmp_path / "prior.safetensors")
    bf16 = {"dtype": torch.bfloat16}
    load_prior(tmp_path / "prior.safetensors", **bf16)  # so that imports are not counted
    before = resident()
    network = load_prior(tmp_path / "prior.safetensors", **bf16)
    assert resident() - before < 75
    assert sum(x.numel() for x in network.parameters()) * 4 / 2**20 > 100


def test_part_can_be_built_more_than_once(prior: State, tmp_path: Path) -> None:
    save_file(prior, tmp_path / "prior.safetensors")
    part = read_part(tmp_path / "prior.safetensors", "prior")
    first = build_part(part, dtype=torch.bfloat16)
    assert next(first.parameters()).dtype == torch.bfloat16
    assert_weights(build_part(part), prior)
