"""The kernels for inference compute what plain torch does."""

from __future__ import annotations

import runpy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers.golden_data import assert_near
from helpers.networks import NETWORKS, VQ
from torch import Tensor, nn

from wuerstchen_core.kernels import attention, dispatch, linear, mlp, vqgan
from wuerstchen_core.kernels.dispatch import is_plain, use_kernels
from wuerstchen_core.models.layers import ChannelwiseMLP
from wuerstchen_core.models.operations import Operations
from wuerstchen_core.models.vqgan import VQGAN


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.mark.parametrize("gelu", [True, False])
@pytest.mark.parametrize("onednn", [True, False])
def test_linear_equals_torch(onednn: bool, gelu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not onednn:
        monkeypatch.setattr(linear, "_onednn_dtypes", tuple)
    x, weight, bias = random(2, 5, 24), random(32, 24), random(32)
    assert linear.uses_onednn(x, weight, bias) == onednn
    expected = F.linear(x, weight, bias)
    assert_near(linear.linear(x, weight, bias, gelu), F.gelu(expected) if gelu else expected, 1e-5)


def test_linear_follows_autograd_and_autocast() -> None:
    x, weight, bias = random(3, 24).requires_grad_(), random(32, 24), random(32)
    linear.linear(x, weight, bias, gelu=True).sum().backward()
    assert x.grad is not None and x.grad.any()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert linear.linear(x, weight, bias).dtype == torch.bfloat16


@pytest.mark.parametrize("scores", [1, 2000, 10**9], ids=["chunks of queries", "chunks of heads", "one chunk"])
def test_chunked_attention_equals_torch(scores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "INFERENCE_SCORES", scores)
    monkeypatch.setattr(attention, "_has_amx", lambda: False)
    q, k, v = (random(2, 3, n, 16, dtype=torch.bfloat16) for n in (150, 40, 40))
    exact = F.scaled_dot_product_attention(q.float(), k.float(), v.float())
    assert_near(attention.attention(q, k, v, 0.0).float(), exact, 0.02)  # bf16 has 8 bits; observed 0.008


@pytest.fixture
def positions(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lists the positions in each call of the MLP kernel, which takes inputs of any size in chunks of 7."""
    seen: list[int] = []
    kernel = mlp._chunked_mlp

    def counted(modules: list[nn.Module], x: Tensor, injected: mlp.MappedLatents | None) -> Tensor:
        seen.append(x.shape[1] * x.shape[2])
        return kernel(modules, x, injected)

    monkeypatch.setattr(mlp, "_chunked_mlp", counted)
    monkeypatch.setattr(mlp, "MIN_POSITIONS", 1)
    monkeypatch.setattr(mlp, "INFERENCE_CHUNK", 7)
    return seen


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)], ids=str)
@pytest.mark.parametrize("name", ["prior", "decoder", "token_decoder", "vqgan"])
def test_networks_equal_plain_torch(name: str, dtype: torch.dtype, tolerance: float, positions: list[int]) -> None:
    """Chunked MLPs, injected latents joined into their first layer, and the VQGAN's folded blocks."""
    network = NETWORKS[name]
    module = network.perturbed().to(dtype)
    inputs = [x.to(dtype) if x.is_floating_point() and x.dim() > 1 else x for x in network.inputs()]
    with torch.no_grad():
        with use_kernels(False):
            expected = network.call(module, *inputs).float()
        assert not positions
        assert_near(network.call(module, *inputs).float(), expected, tolerance)  # in bf16 observed 0.03 of 4
    assert len(positions) == sum(isinstance(layer, ChannelwiseMLP) for layer in module.modules())


def test_forward_mode_derivatives_use_plain_torch(positions: list[int]) -> None:
    """oneDNN's operators have no forward-mode derivatives."""
    module = ChannelwiseMLP(8, 8, 0.0).requires_grad_(False).eval()
    x, direction = random(1, 4, 4, 8), random(1, 4, 4, 8)
    _, tangent = torch.func.jvp(module, (x,), (direction,))
    ends = [module.double()(x.double() + step * direction.double()) for step in (-1e-4, 1e-4)]
    assert_near(tangent, ((ends[1] - ends[0]) / 2e-4).float(), 1e-4)
    assert tangent.abs().max() > 1e-3 and len(positions) == 2


def test_empty_batch() -> None:
    assert ChannelwiseMLP(8, 4, 0.0).eval()(torch.zeros(0, 32, 32, 8)).shape == (0, 32, 32, 4)


class Wrapped(nn.Module):
    """A layer inside an adapter, whose output differs from the layer's own."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + 1


def wrap(parent: nn.Module, name: str) -> None:
    parent.register_module(name, Wrapped(parent.get_submodule(name)))


def patch(parent: nn.Module, name: str) -> None:
    """Replaces `forward`, like ComfyUI's bypass LoRA loader."""
    layer = parent.get_submodule(name)
    original = layer.forward
    layer.forward = lambda x: original(x) + 1


def hook(parent: nn.Module, name: str) -> None:
    parent.get_submodule(name).register_forward_hook(lambda layer, inputs, out: out + 1)


@pytest.mark.parametrize("change", [wrap, patch, hook])
@pytest.mark.parametrize("layer", ["effnet_mappers.1", *(f"down_blocks.1.1.channelwise.{i}" for i in range(5))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_changed_layers_are_called(
    change: Callable[[nn.Module, str], None], layer: str, dtype: torch.dtype, positions: list[int]
) -> None:
    """A kernel must not bypass adapters and hooks by reading a layer's weights."""
    network = NETWORKS["decoder"]
    module = network.perturbed().to(dtype)
    inputs = [x.to(dtype) if x.is_floating_point() and x.dim() > 1 else x for x in network.inputs()]
    parent, _, name = layer.rpartition(".")
    with torch.no_grad():
        unchanged = network.call(module, *inputs)
        change(module.get_submodule(parent), name)
        positions.clear()
        out = network.call(module, *inputs).float()
        with use_kernels(False):
            expected = network.call(module, *inputs).float()
    assert_near(out, expected, 1e-5 if dtype == torch.float32 else 0.1)
    assert positions and (expected - unchanged).abs().max() > 0.2


def test_a_restored_forward_is_no_change() -> None:
    layer = Operations.Linear(2, 2)
    original = layer.forward
    layer.forward = lambda x: original(x) + 1
    assert not is_plain(layer)
    layer.forward = original
    assert is_plain(layer)


@pytest.mark.parametrize("value", ["off", "", "on"])
def test_environment_switch(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WUERSTCHEN_KERNELS", value)
    assert runpy.run_path(str(dispatch.__file__))["kernels_enabled"]() == (value != "off")


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 16])
def test_decoding_in_bands_equals_plain_torch(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """There are no seams, and the memory of a band does not grow with the image's height."""
    sizes: list[int] = []

    def recorded(x: Tensor, *args: Tensor, **kwargs: bool) -> Tensor:
        sizes.append(x[..., 0].numel())
        return linear.linear(x, *args, **kwargs)

    monkeypatch.setattr(vqgan, "linear", recorded)
    monkeypatch.setattr(vqgan, "band_height", lambda *_: rows)
    network = VQGAN(VQ).requires_grad_(False)
    torch.manual_seed(0)
    for x in network.parameters():
        x.normal_(std=0.1)
    largest = []
    for height in (20 * rows, 50 * rows):
        latents = torch.randn(2, 4, height, 5)
        sizes.clear()
        out = network.decode(latents)
        largest.append(max(sizes))
        with use_kernels(False):
            assert_near(out, network.decode(latents), 1e-5)
    assert largest[0] == largest[1] < 20 * rows * 5 * 2 * 4  # positions of the whole image


def test_vqgan_has_gradients_and_no_bands_in_training() -> None:
    latents = torch.randn(1, 4, 8, 5)
    network = VQGAN(VQ)
    assert vqgan.decode_in_bands(network, latents) is None
    network.decode(latents).sum().backward()
    assert network.out_block[0].weight.grad is not None


def test_band_height(kernels: bool) -> None:
    """A whole image at once without kernels; nodes estimate memory from it."""
    assert vqgan.band_height(1, 6, 2**14, cpu=False) == (4 if kernels else 6)
    assert vqgan.band_height(1, 3, 2**14, cpu=False) == 3
    assert vqgan.band_height(2, 100, 64, cpu=True) == (32 if kernels else 100)
