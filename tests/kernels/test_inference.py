"""What makes the networks fast changes nothing: each shortcut beside the plain way."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers.golden_data import assert_near
from helpers.networks import NETWORKS, PRIOR
from torch import Tensor, nn

from wuerstchen_core.kernels import linear
from wuerstchen_core.kernels.linear import product
from wuerstchen_core.models import attention, mlp
from wuerstchen_core.models.prior import Prior, ReadOnce


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.mark.parametrize("gelu", [True, False])
def test_a_product_is_the_plain_one(gelu: bool) -> None:
    x, weight, bias = random(2, 5, 24), random(32, 24), random(32)
    plain = F.linear(x, weight, bias)
    assert_near(product(x, weight, bias, gelu), F.gelu(plain) if gelu else plain, 1e-5)


def test_products_keep_their_gradients_and_their_autocast() -> None:
    x, weight, bias = random(3, 24).requires_grad_(), random(32, 24), random(32)
    product(x, weight, bias, gelu=True).sum().backward()
    assert x.grad is not None and x.grad.any()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert product(x, weight, bias).dtype == torch.bfloat16


def test_a_product_without_onednn_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = random(2, 5, 24), random(32, 24), random(32)
    fast = product(x, weight, bias, gelu=True)
    monkeypatch.setattr(linear, "_dtypes", tuple)
    assert_near(product(x, weight, bias, gelu=True), fast, 1e-5)


@pytest.mark.parametrize("scores", [1, 2000, 10**9], ids=["queries apart", "heads apart", "whole"])
def test_attention_in_pieces_is_attention(scores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "SCORES", scores)
    q, k, v = (random(2, 3, n, 16, dtype=torch.bfloat16) for n in (150, 40, 40))
    exact = F.scaled_dot_product_attention(q.float(), k.float(), v.float())
    assert_near(attention.attend(q, k, v, 0.0).float(), exact, 0.02)  # bf16 has 8 bits; observed 0.008


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Has MLPs of any size take the fast way, in pieces of a few places; lists how many places each had."""
    taken: list[int] = []
    plain = mlp.ChannelwiseMLP._fast

    def counted(self: mlp.ChannelwiseMLP, x: Tensor, injected: mlp.Injected | None) -> Tensor:
        taken.append(x.shape[1] * x.shape[2])
        return plain(self, x, injected)

    monkeypatch.setattr(mlp.ChannelwiseMLP, "_fast", counted)
    monkeypatch.setattr(mlp, "MANY", 10**9)
    monkeypatch.setattr(mlp, "ROWS", 7)
    return taken


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)], ids=str)
@pytest.mark.parametrize("name", ["prior", "decoder", "token_decoder"])
def test_mlps_by_the_fast_way_are_the_same(
    name: str, dtype: torch.dtype, tolerance: float, fast: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In pieces, and with what is injected joined into one product."""
    network = NETWORKS[name]
    module = network.perturbed().to(dtype)
    inputs = [x.to(dtype) if x.is_floating_point() and x.dim() > 1 else x for x in network.inputs()]
    with torch.no_grad():
        plain = network.call(module, *inputs).float()
        assert not fast
        monkeypatch.setattr(mlp, "MANY", 1)
        assert_near(network.call(module, *inputs).float(), plain, tolerance)  # in bf16 observed 0.03 of 4
    assert len(fast) == sum(isinstance(layer, mlp.ChannelwiseMLP) for layer in module.modules())


def test_tangents_pass_through_what_onednn_would_multiply(fast: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward-mode derivatives, of which oneDNN's products know nothing."""
    monkeypatch.setattr(mlp, "MANY", 1)
    module = mlp.ChannelwiseMLP(8, 8, 0.0, linear.Operations).requires_grad_(False).eval()
    x, along = random(1, 4, 4, 8), random(1, 4, 4, 8)
    value, tangent = torch.func.jvp(module, (x,), (along,))
    moved = [module.double()(x.double() + step * along.double()) for step in (-1e-4, 1e-4)]
    assert_near(tangent, ((moved[1] - moved[0]) / 2e-4).float(), 1e-4)
    assert tangent.abs().max() > 1e-3 and len(fast) == 2


def test_no_pictures_are_no_work(fast: list[int]) -> None:
    assert mlp.ChannelwiseMLP(8, 4, 0.0, linear.Operations).eval()(torch.zeros(0, 32, 32, 8)).shape == (0, 32, 32, 4)


class Wrapped(nn.Module):
    """A layer as an adapter wraps it: what it gives is not its weights' product alone."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + 1


def wrapped(parent: nn.Module, name: str) -> None:
    parent.register_module(name, Wrapped(parent.get_submodule(name)))


def patched(parent: nn.Module, name: str) -> None:
    """As ComfyUI's bypassing LoRA loader does it."""
    layer = parent.get_submodule(name)
    original = layer.forward
    layer.forward = lambda x: original(x) + 1


def hooked(parent: nn.Module, name: str) -> None:
    parent.get_submodule(name).register_forward_hook(lambda layer, given, out: out + 1)


@pytest.mark.parametrize("change", [wrapped, patched, hooked])
@pytest.mark.parametrize("layer", ["effnet_mappers.1", *(f"down_blocks.1.1.channelwise.{i}" for i in (0, 1, 2, 4))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_added_to_a_layer_counts(
    change: Callable[[nn.Module, str], None],
    layer: str,
    dtype: torch.dtype,
    fast: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The layer is asked, not its weights: where the fast way is open, and where it is not."""
    network = NETWORKS["decoder"]
    module = network.perturbed().to(dtype)
    inputs = [x.to(dtype) if x.is_floating_point() and x.dim() > 1 else x for x in network.inputs()]
    parent, _, name = layer.rpartition(".")
    with torch.no_grad():
        unchanged = network.call(module, *inputs)
        change(module.get_submodule(parent), name)
        plain = network.call(module, *inputs).float()
        monkeypatch.setattr(mlp, "MANY", 1)
        assert_near(network.call(module, *inputs).float(), plain, 1e-5 if dtype == torch.float32 else 0.1)
    assert fast and (plain - unchanged).abs().max() > 0.2


@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "image_encoder"])  # torchvision's own
def test_networks_without_memory_draw_no_normal_numbers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def draw(*_: object, **__: object) -> None:
        raise AssertionError("torch imports its compiler for this")

    monkeypatch.setattr(nn.init, "normal_", draw)
    with torch.device("meta"):
        NETWORKS[name].build()


def test_a_prior_reads_a_text_once() -> None:
    module = NETWORKS["prior"].perturbed()
    assert isinstance(module, Prior)
    latents, t, text = NETWORKS["prior"].inputs()
    seen = []
    module.cond_mapper.register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        plain, other = module(latents, t, text), module(latents, t, text + 1)
        seen.clear()
        once = ReadOnce(module)
        for _ in range(3):  # both texts of guidance in turn, each a new tensor
            assert torch.equal(module(latents, t, once(text.clone())), plain)
            assert torch.equal(module(latents, t, once(text + 1)), other)
        assert len(seen) == 2
        assert len(once(text)) == PRIOR.depth
