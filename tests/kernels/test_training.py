"""The kernels for training give torch's gradients, in less memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.golden_data import assert_near
from helpers.networks import NETWORKS, PRIOR
from torch import Tensor, nn

from wuerstchen_core.kernels import attention, linear, mlp
from wuerstchen_core.kernels.dispatch import use_kernels
from wuerstchen_core.kernels.dropout import Dropout
from wuerstchen_core.models.layers import ChannelwiseMLP, GlobalResponseNorm
from wuerstchen_core.models.operations import Linear
from wuerstchen_core.models.prior import Prior

DENOISERS = ("prior", "decoder", "token_decoder")


def random(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def gradients(
    module: nn.Module, inputs: list[Tensor], autocast: torch.dtype | None = None, kernels: bool = True
) -> dict[str, Tensor]:
    """Gradients of the parameters, and of the first input unless it holds token indices."""
    module.zero_grad()
    inputs = [x.detach().clone() for x in inputs]
    floating = inputs[0].is_floating_point()
    inputs[0].requires_grad_(floating)
    with use_kernels(kernels):
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            out = module(*inputs)
        (out.float() * random(*out.shape, dtype=torch.float32)).sum().backward()
    grads = {name: p.grad for name, p in module.named_parameters()} | ({"x": inputs[0].grad} if floating else {})
    return {name: grad for name, grad in grads.items() if grad is not None}


def flat(grads: dict[str, Tensor]) -> Tensor:
    return torch.cat([grad.flatten().double() for grad in grads.values()])


@pytest.mark.parametrize("chunk", [512, 20], ids=["all images at once", "one by one"])
@pytest.mark.parametrize("name", DENOISERS)
def test_gradients_equal_torch(name: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlp, "TRAINING_CHUNK", chunk)
    monkeypatch.setattr(attention, "TRAINING_SCORES", 100 * chunk)
    module = NETWORKS[name].perturbed().double()
    inputs = [x.double() if x.is_floating_point() else x for x in NETWORKS[name].inputs()]
    found, expected = (gradients(module, inputs, kernels=kernels) for kernels in (True, False))
    assert found.keys() == expected.keys() and len(found) >= sum(1 for _ in module.parameters())
    for key, grad in expected.items():
        scale = max(1.0, float(grad.abs().max()))
        assert_near(found[key] / scale, grad / scale, 1e-5)  # time embeddings and features are computed in fp32


@pytest.mark.parametrize(
    "layer", ["effnet_mappers.1", *(f"down_blocks.1.1.channelwise.{i}" for i in range(5)), "down_blocks.1.3.attention"]
)
def test_layers_with_hooks_are_called(layer: str) -> None:
    """A kernel must not bypass hooks by reading a layer's weights."""
    module = NETWORKS["decoder"].perturbed().double()
    inputs = [x.double() for x in NETWORKS["decoder"].inputs()]
    without = flat(gradients(module, inputs))
    module.get_submodule(layer).register_forward_hook(lambda layer, inputs, out: 2 * out + 1)
    found, expected = (flat(gradients(module, inputs, kernels=kernels)) for kernels in (True, False))
    assert (found - expected).norm() < 1e-5 * expected.norm() < 1e-4 * (without - expected).norm()


@pytest.mark.parametrize("name", DENOISERS)
def test_mixed_precision_is_as_accurate_as_torch(name: str) -> None:
    """The error against fp32 gradients is at most 1.5 times that of torch's own autocast."""
    module, inputs = NETWORKS[name].perturbed(), list(NETWORKS[name].inputs())
    found = gradients(module, inputs, torch.bfloat16)
    assert {grad.dtype for grad in found.values()} == {torch.float32}
    exact, plain = (flat(gradients(module, inputs, dtype, kernels=False)) for dtype in (None, torch.bfloat16))
    assert (flat(found) - exact).norm() < 1.5 * (plain - exact).norm()


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_gradcheck_of_the_mlp(p: float) -> None:
    norm, dropout = GlobalResponseNorm(6), Dropout(p, 5)
    shapes = ((2, 3, 2, 6), (1, 1, 1, 6), (1, 1, 1, 6), (4, 6), (4,))
    inputs = [random(*shape).requires_grad_() for shape in shapes]
    assert torch.autograd.gradcheck(lambda *x: mlp._MLPTail.apply(norm, dropout, *x), inputs)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("scores", [1, 10**6], ids=["each head", "all heads"])
def test_gradcheck_of_attention(p: float, scores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "TRAINING_SCORES", scores)
    inputs = [random(*shape).requires_grad_() for shape in ((3, 4, 2), (3, 5, 2), (3, 5, 2))]
    dropout = Dropout(p, 5)
    assert torch.autograd.gradcheck(lambda *x: attention._Attention.apply(dropout, *x), inputs)


@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck_of_linear(bias: bool) -> None:
    inputs: list[Any] = [random(2, 3, 4).requires_grad_(), random(5, 4).requires_grad_()]
    inputs.append(random(5).requires_grad_() if bias else None)
    assert torch.autograd.gradcheck(linear._Linear.apply, inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_dropout_is_repeatable_and_drops_its_rate(dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    dropout = Dropout(0.1)
    first, second, third = (torch.ones(101, 997, dtype=dtype) for _ in range(3))
    dropout(first, third)
    dropout(second)
    assert set(first.unique().tolist()) == {0.0, 1.0} and torch.equal(first, third) and not torch.equal(first, second)
    assert abs(first.float().mean().item() - 0.9) < 4 * (0.09 / first.numel()) ** 0.5
    assert dropout.scale == pytest.approx(1 / 0.9)
    again = torch.ones_like(first)
    dropout.restarted()(again)
    assert torch.equal(again, first)
    torch.manual_seed(3)
    assert Dropout(0.1).seed == dropout.seed != Dropout(0.1).seed


def test_dropout_keeps_the_mean() -> None:
    """The mean output of an MLP and of attention over many equal elements stays the same."""
    norm, ones = GlobalResponseNorm(4000), torch.ones(1, 1, 1, 4000)
    x = torch.full((1, 8, 8, 4000), 2.0).requires_grad_()
    zero, mean = 0 * ones, torch.full((1, 4000), 1 / 4000)
    with torch.no_grad():
        plain, dropped = (mlp._MLPTail.apply(norm, Dropout(p, 1), x, zero, zero, mean, None) for p in (0.0, 0.5))
    assert dropped.std() > 0 and abs((dropped / plain).mean().item() - 1) < 0.01
    heads = [torch.zeros(1, 8, 4), torch.zeros(1, 4000, 4), torch.ones(1, 4000, 4)]
    assert abs(attention._Attention.apply(Dropout(0.5, 1), *heads).mean().item() - 1) < 0.02


@pytest.mark.parametrize("p", [1e-6, 1.0])
def test_unsupported_dropout_rates_use_torch(p: float) -> None:
    q, k, v = (torch.randn(1, 2, 8, 4, requires_grad=True) for _ in range(3))
    out = attention.attention(q, k, v, p)
    out.sum().backward()
    assert out.isfinite().all() and v.grad is not None


def saved_bytes(module: nn.Module, inputs: list[Tensor]) -> int:
    """Bytes that autograd saves for the backward pass, without the weights."""
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


@pytest.mark.parametrize(("p", "fraction"), [(0.0, 0.65), (0.1, 0.5)])  # observed 0.61 and 0.46
def test_less_is_saved_for_the_backward_pass(p: float, fraction: float) -> None:
    module = Prior(replace(PRIOR, dropout=p)).train()
    inputs = [random(*shape, dtype=torch.float32) for shape in ((2, 16, 12, 12), (2,), (2, 9, PRIOR.c_cond))]
    found = saved_bytes(module, inputs)
    with use_kernels(False):
        assert 0 < found < fraction * saved_bytes(module, inputs)


def test_a_frozen_linear_layer_saves_no_input() -> None:
    """Most layers are frozen while a LoRA is trained."""
    layer, x = Linear(8, 8), random(2, 8, dtype=torch.float32).requires_grad_()
    trainable = saved_bytes(layer, [x])
    assert saved_bytes(layer.requires_grad_(False), [x]) == 0 < trainable


def test_a_compiled_training_step_is_the_same() -> None:
    module, inputs = NETWORKS["prior"].perturbed(), list(NETWORKS["prior"].inputs())
    expected = gradients(module, inputs)
    torch.compiler.reset()
    module.compile(fullgraph=True, backend="eager")
    assert_near(flat(gradients(module, inputs)), flat(expected), 1e-4)


def test_second_derivatives_are_refused() -> None:
    layer, x = Linear(8, 8), torch.randn(2, 4, 4, 8, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x).sum(), layer.weight, create_graph=False)
    assert grad.isfinite().all()
    with pytest.raises(RuntimeError, match="WUERSTCHEN_KERNELS=off"):
        torch.autograd.grad(layer(x).sum(), x, create_graph=True)
    with use_kernels(False):
        torch.autograd.grad(layer(x).sum(), x, create_graph=True)


def test_torch_func_uses_plain_torch() -> None:
    """It differentiates twice, which the kernels cannot do."""
    module, x = ChannelwiseMLP(8, 8, 0.0).requires_grad_(True).eval(), random(2, 4, 4, 8, dtype=torch.float32)
    hessian = torch.func.grad(lambda x: torch.func.grad(lambda x: module(x).square().sum())(x).square().sum())
    found = hessian(x)
    with use_kernels(False):
        assert_near(found, hessian(x), 1e-6)
    assert found.any()


def test_backward_hooks_run() -> None:
    calls: list[int] = []
    network = ChannelwiseMLP(8, 8, 0.0)
    for layer in network:
        layer.register_full_backward_hook(lambda *_: calls.append(1))
    network(torch.randn(2, 4, 4, 8, requires_grad=True)).sum().backward()
    assert len(calls) == len(network)
