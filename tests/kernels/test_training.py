"""What makes training fast and small on a CPU changes nothing: each gradient beside torch's own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.golden_data import assert_near
from helpers.networks import NETWORKS, PRIOR
from torch import Tensor, nn

from wuerstchen_core.kernels import linear
from wuerstchen_core.kernels.dropout import Dropout
from wuerstchen_core.kernels.linear import Linear, Operations
from wuerstchen_core.models import attention, mlp
from wuerstchen_core.models.attention import attend
from wuerstchen_core.models.mlp import ChannelwiseMLP
from wuerstchen_core.models.prior import Prior

DENOISERS = ("prior", "decoder", "token_decoder")


def only_torch(patch: pytest.MonkeyPatch) -> None:
    """Have nothing but torch's own operations compute gradients."""
    for module in (attention, mlp, linear):
        patch.setattr(module, "learning_cpu", lambda *_: False)


def random(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def gradients(module: nn.Module, inputs: list[Tensor], precision: torch.dtype | None = None) -> dict[str, Tensor]:
    """Of the weights, and of the first input where it is no number of a code."""
    module.zero_grad()
    inputs = [x.detach().clone() for x in inputs]
    of_input = inputs[0].is_floating_point()
    inputs[0].requires_grad_(of_input)
    with torch.autocast("cpu", precision, enabled=precision is not None):
        out = module(*inputs)
    (out.float() * random(*out.shape, dtype=torch.float32)).sum().backward()
    found = {name: p.grad for name, p in module.named_parameters()} | ({"x": inputs[0].grad} if of_input else {})
    return {name: grad for name, grad in found.items() if grad is not None}


def all_of(grads: dict[str, Tensor]) -> Tensor:
    return torch.cat([grad.flatten().double() for grad in grads.values()])


@pytest.mark.parametrize("rows", [512, 20], ids=["all pictures at once", "one by one"])
@pytest.mark.parametrize("name", DENOISERS)
def test_gradients_are_torchs_own(name: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlp, "LEARNT_ROWS", rows)
    monkeypatch.setattr(attention, "LEARNT_SCORES", 100 * rows)
    module = NETWORKS[name].perturbed().double()
    inputs = [x.double() if x.is_floating_point() else x for x in NETWORKS[name].inputs()]
    found = gradients(module, inputs)
    only_torch(monkeypatch)
    expected = gradients(module, inputs)
    assert found.keys() == expected.keys() and len(found) >= sum(1 for _ in module.parameters())
    for key, grad in expected.items():
        scale = max(1.0, float(grad.abs().max()))
        assert_near(found[key] / scale, grad / scale, 1e-5)  # time embeddings and features go through fp32


@pytest.mark.parametrize(
    "layer", ["effnet_mappers.1", *(f"down_blocks.1.1.channelwise.{i}" for i in range(5)), "down_blocks.1.3.attention"]
)
def test_what_is_added_to_a_layer_counts(layer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layer is asked, not its weights."""
    module = NETWORKS["decoder"].perturbed().double()
    inputs = [x.double() for x in NETWORKS["decoder"].inputs()]
    without = all_of(gradients(module, inputs))
    module.get_submodule(layer).register_forward_hook(lambda layer, given, out: 2 * out + 1)
    found = all_of(gradients(module, inputs))
    only_torch(monkeypatch)
    expected = all_of(gradients(module, inputs))
    assert (found - expected).norm() < 1e-5 * expected.norm() < 1e-4 * (without - expected).norm()


@pytest.mark.parametrize("name", DENOISERS)
def test_in_mixed_precision_they_are_as_good(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As near to those of fp32, within a half, as torch's own are under autocast."""
    module, inputs = NETWORKS[name].perturbed(), list(NETWORKS[name].inputs())
    found = gradients(module, inputs, torch.bfloat16)
    assert {grad.dtype for grad in found.values()} == {torch.float32}
    only_torch(monkeypatch)
    exact, torchs = (all_of(gradients(module, inputs, precision)) for precision in (None, torch.bfloat16))
    assert (all_of(found) - exact).norm() < 1.5 * (torchs - exact).norm()


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_an_mlps_gradients_are_its_slopes(share: float) -> None:
    """With dropout, too, whose numbers stay the same."""
    norm = mlp.GlobalResponseNorm(6)
    given = [random(2, 3, 2, 6), random(1, 1, 1, 6), random(1, 1, 1, 6), random(4, 6), random(4)]
    given = [x.requires_grad_() for x in given]
    dropout = Dropout(share, 5)
    assert torch.autograd.gradcheck(lambda *x: mlp._End.apply(norm, dropout, *x), given)


@pytest.mark.parametrize("share", [0.0, 0.3])
@pytest.mark.parametrize("scores", [1, 10**6], ids=["each head", "all heads"])
def test_attentions_gradients_are_its_slopes(share: float, scores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "LEARNT_SCORES", scores)
    given = [x.requires_grad_() for x in (random(3, 4, 2), random(3, 5, 2), random(3, 5, 2))]
    dropout = Dropout(share, 5)
    assert torch.autograd.gradcheck(lambda *x: attention._Attention.apply(dropout, *x), given)


@pytest.mark.parametrize("bias", [True, False])
def test_a_products_gradients_are_its_slopes(bias: bool) -> None:
    given: list[Any] = [random(2, 3, 4).requires_grad_(), random(5, 4).requires_grad_()]
    given.append(random(5).requires_grad_() if bias else None)
    assert torch.autograd.gradcheck(linear._Product.apply, given)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_dropout_drops_its_share_and_the_same_again(dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    dropout = Dropout(0.1)
    first, second, third = (torch.ones(101, 997, dtype=dtype) for _ in range(3))
    dropout(first, third)
    dropout(second)
    assert set(first.unique().tolist()) == {0.0, 1.0} and torch.equal(first, third) and not torch.equal(first, second)
    assert abs(first.float().mean().item() - 0.9) < 4 * (0.09 / first.numel()) ** 0.5
    assert dropout.scale == pytest.approx(1 / 0.9)
    again = torch.ones_like(first)
    dropout.again()(again)
    assert torch.equal(again, first)
    torch.manual_seed(3)
    assert Dropout(0.1).seed == dropout.seed != Dropout(0.1).seed


def test_dropout_leaves_the_mean_as_it_is() -> None:
    """Of what an MLP and attention make of many numbers that are alike."""
    norm, ones = mlp.GlobalResponseNorm(4000), torch.ones(1, 1, 1, 4000)
    x = torch.full((1, 8, 8, 4000), 2.0).requires_grad_()
    zero, mean = 0 * ones, torch.full((1, 4000), 1 / 4000)
    with torch.no_grad():
        plain, dropped = (mlp._End.apply(norm, Dropout(share, 1), x, zero, zero, mean, None) for share in (0.0, 0.5))
    assert dropped.std() > 0 and abs((dropped / plain).mean().item() - 1) < 0.01
    heads = [torch.zeros(1, 8, 4), torch.zeros(1, 4000, 4), torch.ones(1, 4000, 4)]
    assert abs(attention._Attention.apply(Dropout(0.5, 1), *heads).mean().item() - 1) < 0.02


def kept_bytes(module: nn.Module, inputs: list[Tensor]) -> int:
    """What is kept for the gradients beside the weights."""
    weights = {p.data_ptr() for p in module.parameters()}
    sizes: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        if x.data_ptr() not in weights:
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), torch.autocast("cpu", torch.bfloat16):
        out = module(*inputs)
    assert out.requires_grad
    return sum(sizes.values())


@pytest.mark.parametrize(("share", "least"), [(0.0, 0.65), (0.1, 0.5)])  # observed 0.61 and 0.46
def test_less_is_kept_for_the_gradients(share: float, least: float, monkeypatch: pytest.MonkeyPatch) -> None:
    params = replace(PRIOR, dropout=share)
    module = Prior(params).train()
    inputs = [random(*shape, dtype=torch.float32) for shape in ((2, 16, 12, 12), (2,), (2, 9, PRIOR.c_cond))]
    little = kept_bytes(module, inputs)
    only_torch(monkeypatch)
    assert 0 < little < least * kept_bytes(module, inputs)


def test_a_frozen_products_input_is_not_kept() -> None:
    """As most are where a LoRA learns."""
    layer, x = Linear(8, 8), random(2, 8, dtype=torch.float32).requires_grad_()
    both = kept_bytes(layer, [x])
    assert kept_bytes(layer.requires_grad_(False), [x]) == 0 < both


def test_a_compiled_training_step_is_the_same() -> None:
    module, inputs = NETWORKS["prior"].perturbed(), list(NETWORKS["prior"].inputs())
    expected = gradients(module, inputs)
    torch.compiler.reset()
    module.compile(fullgraph=True, backend="eager")
    found = gradients(module, inputs)
    assert_near(all_of(found), all_of(expected), 1e-4)


def test_gradients_of_gradients_are_refused() -> None:
    x = torch.randn(2, 4, 4, 8, requires_grad=True)
    layer = Linear(8, 8)
    (grad,) = torch.autograd.grad(layer(x).sum(), layer.weight, create_graph=False)
    assert grad.isfinite().all()
    with pytest.raises(RuntimeError, match="no gradients of gradients on a CPU"):
        torch.autograd.grad(layer(x).sum(), x, create_graph=True)


@pytest.mark.parametrize("share", [1e-6, 1.0])
def test_a_share_that_16_bits_do_not_hold_is_torchs_to_drop(share: float) -> None:
    q, k, v = (torch.randn(1, 2, 8, 4, requires_grad=True) for _ in range(3))
    out = attend(q, k, v, share)
    out.sum().backward()
    assert out.isfinite().all() and v.grad is not None


def test_who_listens_to_gradients_hears_them() -> None:
    heard: list[int] = []
    network = ChannelwiseMLP(8, 8, 0.0, Operations)
    for layer in network:
        layer.register_full_backward_hook(lambda *_: heard.append(1))
    network(torch.randn(2, 4, 4, 8, requires_grad=True)).sum().backward()
    assert len(heard) == len(network)
