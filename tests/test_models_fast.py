"""What makes the networks fast changes nothing: each shortcut beside the plain way."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from golden_data import assert_near
from networks import NETWORKS, PRIOR
from torch import Tensor, nn

from wuerstchen_core.models import attention, layers, pointwise
from wuerstchen_core.models.pointwise import product
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
    monkeypatch.setattr(pointwise, "_dtypes", tuple)
    assert_near(product(x, weight, bias, gelu=True), fast, 1e-5)


@pytest.mark.parametrize("scores", [1, 2000, 10**9], ids=["queries apart", "heads apart", "whole"])
def test_attention_in_pieces_is_attention(scores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "SCORES", scores)
    q, k, v = (random(2, 3, n, 16, dtype=torch.bfloat16) for n in (150, 40, 40))
    exact = F.scaled_dot_product_attention(q.float(), k.float(), v.float())
    assert_near(attention.attend(q, k, v, 0.0).float(), exact, 0.02)  # bf16 has 8 bits; observed 0.008


@pytest.mark.parametrize("name", ["prior", "decoder", "token_decoder"])
def test_mlps_in_pieces_are_the_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network = NETWORKS[name]
    module, inputs = network.perturbed(), network.inputs()
    with torch.no_grad():
        whole = network.call(module, *inputs)
        monkeypatch.setattr(layers, "MANY", 1)
        monkeypatch.setattr(layers, "ROWS", 7)
        assert_near(network.call(module, *inputs), whole, 1e-5)


class Wrapped(nn.Module):
    """A layer as an adapter wraps it: what it gives is not its weights' product alone."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * 1.0


def test_what_is_injected_takes_the_mappers_way_too() -> None:
    """The two maps in one, against one after the other, as they are where a layer is wrapped."""
    network = NETWORKS["decoder"]
    module, inputs = network.perturbed(), network.inputs()
    with torch.no_grad():
        joined = network.call(module, *inputs)
        mappers = module.get_submodule("effnet_mappers")
        for name, mapper in list(mappers.named_children()):
            mappers.register_module(name, Wrapped(mapper))
        assert_near(network.call(module, *inputs), joined, 1e-5)


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
