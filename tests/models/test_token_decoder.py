"""The v1 decoder against outputs of the original code, and its initialisation."""

from __future__ import annotations

import pytest
import torch
from helpers.golden_data import Golden, assert_near
from helpers.networks import TOKEN_DECODER
from torch import Tensor, nn

from wuerstchen_core.models.token_decoder import TokenDecoder, TokenDecoderParams

pytestmark = pytest.mark.usefixtures("kernels")
TOLERANCE = 1e-4  # of logits up to 30; observed 1e-5


@pytest.fixture(scope="module")
def golden() -> Golden:
    return Golden("paella_small")


@pytest.fixture(scope="module")
def decoder(golden: Golden) -> TokenDecoder:
    network = TokenDecoder(TokenDecoderParams(**golden.sizes())).eval().requires_grad_(False)
    network.load_state_dict(golden.under("weights/"))  # keys have the original's names
    return network


@pytest.mark.parametrize("time", ["t0", "t05", "t1", "tmix"])
def test_logits(golden: Golden, decoder: TokenDecoder, time: str) -> None:
    out = decoder(golden["in/x"], golden[f"in/r_{time}"], golden["in/effnet"], golden["in/byt5"])
    assert_near(out, golden[f"out/logits_{time}"], TOLERANCE)


def test_zeros_as_prior_latents(golden: Golden, decoder: TokenDecoder) -> None:
    out = decoder(golden["in/x"], golden["in/r_tmix"], torch.zeros_like(golden["in/effnet"]), golden["in/byt5"])
    assert_near(out, golden["out/logits_tmix_effnet_zero"], TOLERANCE)


def test_without_text(golden: Golden, decoder: TokenDecoder) -> None:
    out = decoder(golden["in/x"], golden["in/r_tmix"], golden["in/effnet"], golden["in/byt5"][:, :0])
    assert_near(out, golden["out/logits_tmix_no_text"], TOLERANCE)


def test_conditioning_sequence(golden: Golden, decoder: TokenDecoder) -> None:
    assert_near(decoder.condition(golden["in/effnet"], golden["in/byt5"]), golden["out/c_embed"], 1e-5)


def test_sizes_that_are_no_multiple_are_refused() -> None:
    decoder = TokenDecoder(TOKEN_DECODER)
    tokens = torch.zeros(1, 20, 24, dtype=torch.long)
    with pytest.raises(ValueError, match=r"24x20.* 8 \(32 pixels\)"):
        decoder(tokens, torch.ones(1), torch.zeros(1, 16, 2, 3), torch.zeros(1, 7, 24))


def test_initial_weights() -> None:
    torch.manual_seed(0)
    decoder = TokenDecoder(TOKEN_DECODER)
    decoder.init_weights()
    # The original leaves the transposed convolutions at torch's defaults.
    ups = {f"{name}.bias" for name, layer in decoder.named_modules() if isinstance(layer, nn.ConvTranspose2d)}
    zeros: list[Tensor] = [
        p for name, p in decoder.named_parameters() if name.endswith(("bias", ".gamma", ".beta")) and name not in ups
    ]
    assert len(ups) == 2 and not any(p.any() for p in zeros)
    assert not decoder.clf[1].weight.any()
    codes = decoder.in_mapper[0].weight
    assert float(codes.detach().std()) == pytest.approx((1 / 64) ** 0.5, rel=0.1)
    assert torch.equal(decoder.out_mapper[1].weight[:, :, 0, 0], codes) and decoder.out_mapper[1].weight is not codes
    for layer in (decoder.byt5_mapper, decoder.effnet_mapper):
        assert float(layer.weight.detach().std()) == pytest.approx(0.02, rel=0.15)
    conv, time = decoder.down_blocks[0]
    assert not time.mapper.weight.any()
    attention = decoder.down_blocks[1][3].attention.attn
    bounds = {
        attention.in_proj_weight: (6 / (64 + 192)) ** 0.5,
        attention.out_proj.weight: (6 / (64 + 64)) ** 0.5,
        decoder.embedding[1].weight: 0.02 * (6 / (64 + 32)) ** 0.5,
        conv.channelwise[-1].weight: (6 / (32 + 128)) ** 0.5 * (1 / 5) ** 0.5,  # 1 + 2 + 2 repeats
    }
    for weight, bound in bounds.items():
        assert 0.95 * bound < float(weight.detach().abs().max()) <= bound
