"""The VQGAN against outputs of the original code, in eval and in train mode, and its initialisation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers.golden_data import Golden, assert_near
from helpers.networks import VQ

from wuerstchen_core.models.layers import nearest_codes
from wuerstchen_core.models.vqgan import VQGAN, VQGANParams, VQResBlock

pytestmark = pytest.mark.usefixtures("kernels")
TOLERANCE = 2e-5  # observed 4e-6


@pytest.fixture(scope="module")
def golden() -> Golden:
    return Golden("vqmodel_small")


@pytest.fixture
def vqgan(golden: Golden) -> VQGAN:
    network = VQGAN(VQGANParams(**golden.sizes())).eval()
    network.load_state_dict(golden.weights())
    return network


@torch.no_grad()
def test_encode_and_quantize(golden: Golden, vqgan: VQGAN) -> None:
    scale = vqgan.params.scale_factor  # divides the original's latents; ours are in codebook units
    latents = vqgan.encode(golden["in/x"])
    quantized = vqgan.quantize(latents)
    assert_near(latents / scale, golden["out/enc_x"], TOLERANCE)
    assert_near(quantized.latents / scale, golden["out/enc_qe"], TOLERANCE)
    assert torch.equal(quantized.indices, golden["out/enc_indices"])
    loss = quantized.codebook_loss + 0.25 * quantized.commit_loss
    assert_near(loss, golden["out/enc_loss"], TOLERANCE)


@torch.no_grad()
def test_quantize_any_latents(golden: Golden, vqgan: VQGAN) -> None:
    quantized = vqgan.quantize(golden["in/z"])
    assert_near(quantized.latents, golden["out/vq_z_q"], TOLERANCE)
    assert torch.equal(quantized.indices, golden["out/vq_z_indices"])
    assert_near(quantized.codebook_loss, golden["out/vq_z_loss"], TOLERANCE)
    assert_near(quantized.commit_loss, golden["out/vq_z_commit"], TOLERANCE)


@torch.no_grad()
def test_decode(golden: Golden, vqgan: VQGAN) -> None:
    scale = vqgan.params.scale_factor
    for latents, image in (("in/z", "dec_z"), ("out/enc_x", "dec_from_enc_x"), ("out/enc_qe", "dec_from_qe")):
        assert_near(vqgan.decode(golden[latents] * scale), golden[f"out/{image}"], TOLERANCE)


@torch.no_grad()
def test_decode_indices(golden: Golden, vqgan: VQGAN) -> None:
    for indices, image in (("in/idx", "dec_idx"), ("out/enc_indices", "dec_indices_of_enc")):
        latents = vqgan.indices_to_latents(golden[indices])
        assert_near(vqgan.decode(latents), golden[f"out/{image}"], TOLERANCE)


def test_training(golden: Golden, vqgan: VQGAN) -> None:
    """Batch statistics, losses and gradients of one step."""
    vqgan.train()
    images, scale = golden["in/x"], vqgan.params.scale_factor
    latents = vqgan.encode(images)
    quantized = vqgan.quantize(latents)
    reconstruction = vqgan.decode(quantized.latents)
    mse, vq_loss = F.mse_loss(reconstruction, images), quantized.codebook_loss + 0.25 * quantized.commit_loss
    (mse + vq_loss).backward()

    assert_near(latents / scale, golden["train/enc_x"], TOLERANCE)
    assert_near(quantized.latents / scale, golden["train/enc_qe"], TOLERANCE)
    assert torch.equal(quantized.indices, golden["train/enc_indices"])
    assert_near(reconstruction, golden["train/rec"], TOLERANCE)
    for name, loss in (("mse", mse), ("vq_loss", vq_loss), ("total", mse + vq_loss)):
        assert_near(loss, golden[f"train/{name}"], TOLERANCE)
    norm = vqgan.down_blocks[-1][1]
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert_near(getattr(norm, name), golden[f"train/{name}_after"], TOLERANCE)
    gradients = golden.under("train/grad/")
    assert len(gradients) == 8
    for name, expected in gradients.items():
        gradient = vqgan.get_parameter(name).grad
        assert gradient is not None
        assert_near(gradient, expected, TOLERANCE)


def test_chunks_do_not_change_the_nearest_code() -> None:
    rows, codebook = torch.randn(100, 4), torch.randn(32, 4)
    assert torch.equal(nearest_codes(rows, codebook, chunk=7), nearest_codes(rows, codebook))


def test_sizes_that_are_no_multiple_are_refused() -> None:
    with pytest.raises(ValueError, match="30x32 pixels.* 4$"):
        VQGAN(VQ).encode(torch.zeros(1, 3, 32, 30))


def test_initial_weights() -> None:
    torch.manual_seed(0)
    vqgan = VQGAN(VQ)
    vqgan.init_weights()
    blocks = [block for block in vqgan.modules() if isinstance(block, VQResBlock)]
    assert len(blocks) == 5
    bound = (6 / (32 + 128)) ** 0.5
    for block in blocks:
        assert not block.gammas.any() and not block.depthwise[1].bias.any() and not block.channelwise[0].bias.any()
    assert 0.95 * bound < float(blocks[1].channelwise[0].weight.detach().abs().max()) <= bound
    assert 0.9 / 64 < float(vqgan.vquantizer.codebook.weight.detach().abs().max()) <= 1 / 64
