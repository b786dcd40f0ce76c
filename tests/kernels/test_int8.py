"""Layers in int8 compute what their restored weights do, up to the rounding of their inputs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.golden_data import assert_near
from helpers.networks import NETWORKS, VQ
from torch import Tensor

from wuerstchen_core.common.devices import has_int8
from wuerstchen_core.common.int8 import quantize_rows
from wuerstchen_core.kernels import int8
from wuerstchen_core.kernels.dispatch import use_kernels
from wuerstchen_core.models.int8 import Int8Linear, int8_layers, set_dtype, use_int8
from wuerstchen_core.models.operations import Linear
from wuerstchen_core.models.vqgan import VQGAN

needs_int8 = pytest.mark.skipif(not has_int8(), reason="this processor has no int8 products")


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def layer(c_in: int = 96, c_out: int = 160, bias: bool = True) -> tuple[Linear, Int8Linear]:
    with torch.no_grad():
        plain = Linear(c_in, c_out, bias=bias)
        plain.weight.copy_(random(c_out, c_in))
    return plain.requires_grad_(False), Int8Linear.of(plain)


def test_weights_are_rounded_by_half_a_step_of_their_row() -> None:
    weight = random(5, 64) * torch.tensor([[1e-3], [1.0], [50.0], [0.0], [2.0]])
    numbers, scale = quantize_rows(weight)
    assert numbers.dtype == torch.int8 and numbers.abs().amax(1).tolist() == [127, 127, 127, 0, 127]
    assert ((numbers * scale - weight).abs() <= scale / 2 * 1.001).all()


@pytest.mark.parametrize("shift", [-9.0, 0.0, 9.0])
def test_inputs_use_all_steps_and_zero_is_exact(shift: float) -> None:
    x = random(300, 40) + shift
    x[0, 0] = 0
    quantised = int8.quantize(x)
    assert quantised is not None and 0 <= quantised.zero <= 255
    restored = (quantised.values.int() - quantised.zero) * quantised.scale
    assert restored[0, 0] == 0
    assert (restored - x).abs().max() <= quantised.scale * 0.501
    assert int(quantised.values.max()) - int(quantised.values.min()) >= (253 if shift == 0 else 100)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@needs_int8
def test_linear(dtype: torch.dtype, bias: bool) -> None:
    _, quantised = layer(bias=bias)
    x = random(2, 7, 96).to(dtype)
    expected = F.linear(x.float(), *quantised.weights(torch.empty(())))
    found = quantised(x)
    assert found.dtype == dtype and found.shape == (2, 7, 160)
    assert 1e-4 < relative_error(found, expected) < 0.012  # observed 0.008: the inputs are rounded
    with use_kernels(False):
        assert relative_error(quantised(x), expected) < 0.01


@needs_int8
def test_empty_and_infinite_inputs() -> None:
    _, quantised = layer()
    assert quantised(random(0, 96)).shape == (0, 160)
    x = random(3, 96)
    x[1, 2] = torch.nan
    assert torch.equal(quantised(x).isnan().any(dim=1), torch.tensor([False, True, False]))


@needs_int8
def test_a_packed_layer_is_saved_loaded_copied_and_moved() -> None:
    plain, quantised = layer()
    before = {key: x.clone() for key, x in quantised.state_dict().items()}
    x = random(4, 96)
    expected = quantised(x)
    assert quantised.weight.is_meta  # nothing but the packed weight is in memory
    assert torch.equal(copy.deepcopy(quantised)(x), expected)
    quantised(x)
    for key, value in quantised.state_dict().items():
        assert torch.equal(value, before[key])
    quantised(x)
    assert quantised.half().weight_scale.dtype == torch.float32 and quantised.weight.dtype == torch.int8
    assert relative_error(quantised(x), expected) < 0.002
    quantised.load_state_dict({"weight": 2 * plain.weight, "bias": plain.bias}, assign=True)
    assert relative_error(quantised(x) - plain.bias, 2 * (expected - plain.bias)) < 1e-5


def test_gradients_pass_through_to_inputs() -> None:
    _, quantised = layer()
    x = random(3, 96).requires_grad_()
    quantised(x).sum().backward()
    assert x.grad is not None
    assert_near(x.grad, quantised.weights(x)[0].sum(0).expand(3, -1), 1e-4)


@pytest.mark.parametrize("rows", [1, 40])
def test_product_of_gpus(rows: int) -> None:
    """On a CPU, where torch has the same operator."""
    plain, quantised = layer()
    x = random(rows, 96)
    found = int8.product_by_rows(x, quantised.weight, quantised.weight_scale, quantised.bias, torch.float32)
    assert relative_error(found, plain(x)) < 0.015  # observed 0.010


@pytest.mark.parametrize("name", ["prior", "decoder", "token_decoder", "vqgan", "text_encoder"])
@needs_int8
def test_networks(name: str) -> None:
    """All paths: chunked MLPs, latents joined in fp32, folded blocks and packed projections."""
    network = NETWORKS[name]
    plain, inputs = network.perturbed().requires_grad_(False), network.inputs()
    quantised = copy.deepcopy(plain)
    use_int8(quantised)
    assert len(list(int8_layers(quantised))) > 3
    with torch.no_grad():
        expected = network.call(plain, *inputs)
        fast = network.call(quantised, *inputs)
        with use_kernels(False):
            slow = network.call(quantised, *inputs)
    assert 1e-4 < relative_error(fast, expected) < 0.05
    assert relative_error(slow, expected) < 0.05 and not torch.equal(fast, slow)
    set_dtype(quantised, torch.float32)
    assert not list(int8_layers(quantised))
    with torch.no_grad():
        assert relative_error(network.call(quantised, *inputs), slow) < 1e-4


@needs_int8
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_changed_mapper_takes_effect(mode: Callable[[], Any], name: str) -> None:
    """The latents' map is merged into the next layer once, but not for longer than it stays the same."""
    network = NETWORKS["decoder"]
    with mode():
        decoder, inputs = copy.deepcopy(network.perturbed().requires_grad_(False)), network.inputs()
        use_int8(decoder)
        before = network.call(decoder, *inputs)
        assert torch.equal(network.call(decoder, *inputs), before)
        mapper = decoder.get_submodule("effnet_mappers.1")
        mapper.get_parameter(name).mul_(3)  # in place
        after = network.call(decoder, *inputs)
        assert torch.equal(after, network.call(copy.deepcopy(decoder), *inputs))  # which packs its weights anew
    assert not torch.equal(after, before)


@needs_int8
def test_vqgan_with_a_nan_gives_nan() -> None:
    vqgan = VQGAN(VQ).requires_grad_(False).eval()
    use_int8(vqgan)
    latents = torch.full((1, 4, 8, 8), torch.nan)
    assert vqgan.decode(latents).isnan().all()
