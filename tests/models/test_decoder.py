"""The v2 decoder against outputs of the original code, and its initialisation."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from helpers.golden_data import Golden, assert_near
from helpers.networks import DECODER
from torch import Tensor, nn

from wuerstchen_core.models.decoder import Decoder, DecoderParams, resize_prior_latents

pytestmark = pytest.mark.usefixtures("kernels")
TOLERANCE = 2e-5  # observed 2e-6


@pytest.fixture(scope="module")
def golden() -> Golden:
    return Golden("diffnext_small")


@pytest.fixture(scope="module")
def decoder(golden: Golden) -> Decoder:
    network = Decoder(DecoderParams(**golden.sizes())).eval().requires_grad_(False)
    network.load_state_dict(golden.weights())
    return network


@pytest.mark.parametrize("time", ["t0", "t05", "t1", "tmix"])
def test_noise(golden: Golden, decoder: Decoder, time: str) -> None:
    out = decoder(golden["in/x"], golden[f"in/r_{time}"], golden["in/effnet"], golden["in/clip"])
    assert_near(out, golden[f"out/eps_{time}"], TOLERANCE)


def test_noise_of_a_tall_image(golden: Golden, decoder: Decoder) -> None:
    names = ("in/x_32x16", "in/r_32x16", "in/effnet_32x16", "in/clip_32x16")
    assert_near(decoder(*(golden[name] for name in names)), golden["out/eps_32x16"], TOLERANCE)


def test_prior_latents_of_another_size(golden: Golden, decoder: Decoder) -> None:
    out = decoder(golden["in/x"], golden["in/r_tmix"], golden["in/effnet_13x9"], golden["in/clip"])
    assert_near(out, golden["out/eps_tmix_effnet_13x9"], TOLERANCE)


def test_zeros_as_prior_latents(golden: Golden, decoder: Decoder) -> None:
    out = decoder(golden["in/x"], golden["in/r_tmix"], torch.zeros_like(golden["in/effnet"]), golden["in/clip"])
    assert_near(out, golden["out/eps_tmix_effnet_zero"], TOLERANCE)


def test_the_two_maps_of_the_head(golden: Golden, decoder: Decoder) -> None:
    a, b = decoder.forward_ab(golden["in/x"], golden["in/r_tmix"], golden["in/effnet"], golden["in/clip"])
    assert_near(a, golden["out/a_tmix"], TOLERANCE)
    assert_near(b, golden["out/b_tmix"], TOLERANCE)


def test_every_level_down(golden: Golden, decoder: Decoder) -> None:
    """The deepest level has every kind of block: C, T, F and A."""
    seen: list[Tensor] = []
    hooks = [
        level[-1].register_forward_hook(lambda module, inputs, out: seen.insert(0, out))
        for level in decoder.down_blocks
    ]
    decoder(golden["in/x"], golden["in/r_tmix"], golden["in/effnet"], golden["in/clip"])
    for hook in hooks:
        hook.remove()
    assert len(seen) == 3
    for i, out in enumerate(seen):
        assert_near(out, golden[f"out/trace_down_deepest_first{i}_tmix"], TOLERANCE)


@pytest.mark.parametrize(
    ("source", "size"),
    [("effnet", (2, 3)), ("effnet", (4, 6)), ("effnet", (8, 12)), ("effnet_13x9", (2, 3)), ("effnet_13x9", (4, 6))],
)
def test_resize_of_prior_latents(golden: Golden, source: str, size: tuple[int, int]) -> None:
    name = f"out/resize_{source}_to_{size[0]}x{size[1]}"
    assert_near(resize_prior_latents(golden[f"in/{source}"], size), golden[name], TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_resize_computes_in_fp32(golden: Golden, dtype: torch.dtype) -> None:
    latents = golden["in/effnet"].to(dtype)
    assert torch.equal(resize_prior_latents(latents, (4, 6)), resize_prior_latents(latents.float(), (4, 6)))


def test_sizes_that_are_no_multiple_are_refused() -> None:
    decoder = Decoder(DECODER)
    with pytest.raises(ValueError, match=r"24x20.* 8 \(32 pixels\)"):
        decoder(torch.zeros(1, 4, 20, 24), torch.ones(1), torch.zeros(1, 16, 2, 3), torch.zeros(1, 7, 24))


def test_an_unknown_block_is_refused() -> None:
    with pytest.raises(ValueError, match="'X'"):
        Decoder(DecoderParams(c_hidden=(8,), nhead=(1,), blocks=(1,), level_config=("CX",), inject_effnet=(False,)))


def test_initial_weights() -> None:
    torch.manual_seed(0)
    decoder = Decoder(DECODER)
    decoder.init_weights()
    # The original leaves the transposed convolutions at torch's defaults.
    ups = {f"{name}.bias" for name, layer in decoder.named_modules() if isinstance(layer, nn.ConvTranspose2d)}
    zeros = [
        p for name, p in decoder.named_parameters() if name.endswith((".bias", ".gamma", ".beta")) and name not in ups
    ]
    assert len(ups) == 2 and not any(p.any() for p in zeros)
    assert not decoder.clf[1].weight.any()
    for layer in (decoder.clip_mapper, *filter(None, decoder.effnet_mappers)):
        assert float(layer.weight.detach().std()) == pytest.approx(0.02, rel=0.15)
    conv, time = decoder.down_blocks[0]
    assert not time.mapper.weight.any()
    bounds = {
        decoder.embedding[1].weight: 0.02 * (6 / (16 + 32)) ** 0.5,
        conv.channelwise[0].weight: (6 / (32 + 128)) ** 0.5,
        conv.channelwise[-1].weight: (6 / (32 + 128)) ** 0.5 * (1 / 5) ** 0.5,  # 1 + 2 + 2 repeats
        decoder.up_blocks[0][2].channelwise[-1].weight: (6 / (64 + 256)) ** 0.5 * (1 / 5) ** 0.5,  # feed-forward
    }
    for weight, bound in bounds.items():
        assert 0.95 * bound < float(weight.detach().abs().max()) <= bound


def test_blocks_are_numbered_as_in_other_unets() -> None:
    """v2 repeats its patterns 4, 4, 14 and 4 times per level, with a change to a coarser level between them."""
    with torch.device("meta"):
        blocks = Decoder(DecoderParams()).blocks
    counts = Counter(block.kind for block in blocks)
    assert counts == {"input": 4 + 1 + 4 + 1 + 14 + 1 + 4 - 1, "middle": 1, "output": 4 + 14 + 4 + 4}
    for kind, first in (("input", 1), ("middle", 0), ("output", 0)):
        assert [block.number for block in blocks if block.kind == kind] == list(range(first, first + counts[kind]))
    assert [block.number for block in blocks if block.saves_skip] == [4, 9, 24]
    assert [block.number for block in blocks if block.takes_skip] == [4, 18, 22]
