"""Properties of every network: shapes, gradients, compilation, precision, saving, independence of the batch."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.golden_data import assert_near
from helpers.networks import NETWORKS, PRIOR, VQ, Network
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from wuerstchen_core.kernels import dispatch
from wuerstchen_core.models.attention import Attention, MultiHeadAttention
from wuerstchen_core.models.layers import FeedForwardBlock, GlobalResponseNorm
from wuerstchen_core.models.prior import Prior
from wuerstchen_core.models.vqgan import VQGAN

SHALLOW_PRIOR = replace(NETWORKS["prior"], build=lambda: Prior(replace(PRIOR, depth=1)))  # the quickest to compile


@pytest.fixture(params=list(NETWORKS))
def network(request: pytest.FixtureRequest) -> Network:
    return NETWORKS[request.param]


def relative(value: Tensor, expected: Tensor) -> float:
    """Root mean square error in units of the expected tensor's root mean square."""
    return float((value.float() - expected).square().mean().sqrt() / expected.square().mean().sqrt())


def test_output_is_finite_and_has_the_documented_shape(network: Network) -> None:
    with torch.no_grad():
        out = network.call(network.perturbed(), *network.inputs())
    assert tuple(out.shape) == network.shape
    assert out.isfinite().all() and out.std() > 0
    assert out.is_contiguous()


def test_every_parameter_gets_a_gradient(network: Network) -> None:
    module = network.perturbed()
    if isinstance(module, VQGAN):
        images = network.inputs()[0]
        quantized = module.quantize(module.encode(images))
        out = module.decode(quantized.latents)
        extra = quantized.codebook_loss + quantized.commit_loss
    else:
        out, extra = network.call(module, *network.inputs()), torch.zeros(())
    target = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    ((out - target).square().mean() + extra).backward()
    for name, parameter in module.named_parameters():
        gradient = parameter.grad
        assert gradient is not None and gradient.isfinite().all(), name
        if name.endswith("to_k.bias"):  # shifts all scores of a query equally, which the softmax cancels
            assert gradient.abs().max() < 1e-6, name
        else:
            assert gradient.any(), name


def test_output_is_the_same_with_gradients(network: Network) -> None:
    module, inputs = network.perturbed(), network.inputs()
    with torch.no_grad():
        expected = network.call(module, *inputs)
    assert_near(network.call(module, *inputs).detach(), expected, 1e-5)


def test_compiles_into_one_graph(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    module, inputs = network.perturbed(), network.inputs()
    torch.compiler.reset()
    with torch.no_grad():
        compiled = torch.compile(network.call, fullgraph=True, backend="eager")(module, *inputs)
        monkeypatch.setattr(dispatch, "_plain_cpu_tensors", lambda *_: False)  # as within a graph
        assert_near(compiled, network.call(module, *inputs), 1e-6)


@pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize(
    "network",
    [
        pytest.param(SHALLOW_PRIOR, id="shallow prior"),
        *(pytest.param(network, id=name, marks=pytest.mark.long) for name, network in NETWORKS.items()),
    ],
)
def test_inductor_agrees(network: Network) -> None:
    module, inputs = network.perturbed(), network.inputs()
    torch.compiler.reset()
    compiled = torch.compile(network.call, fullgraph=True)
    with torch.no_grad():
        # With inductor's own exp in the time embedding: 4e-6 to 3e-5.
        assert relative(compiled(module, *inputs), network.call(module, *inputs)) < 2e-6


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.03), (torch.float16, 0.005)], ids=str)
def test_half_precision_stays_close(network: Network, dtype: torch.dtype, tolerance: float) -> None:
    module, inputs = network.perturbed(), network.inputs()
    with torch.no_grad():
        expected = network.call(module, *inputs)
        # All callers keep the dtype of times and token ids.
        half = [x.to(dtype) if x.is_floating_point() and x.dim() > 1 else x for x in inputs]
        out = network.call(module.to(dtype), *half)
    assert out.dtype == dtype
    assert relative(out, expected) < tolerance


def test_response_norm_does_not_overflow_in_fp16() -> None:
    norm = GlobalResponseNorm(2)
    with torch.no_grad():
        norm.gamma.fill_(1)
        x = torch.full((1, 16, 16, 2), 40.0)  # 256 * 1600 overflows fp16
        assert relative(norm.half()(x.half()), norm.float()(x)) < 0.005


def test_saves_and_loads(network: Network, tmp_path: Path) -> None:
    module, inputs = network.perturbed(), network.inputs()
    save_file(module.state_dict(), tmp_path / "weights.safetensors")
    other = network.build().eval()
    other.load_state_dict(load_file(tmp_path / "weights.safetensors"))
    with torch.no_grad():
        assert torch.equal(network.call(other, *inputs), network.call(module, *inputs))


def test_a_batch_equals_its_singles(network: Network) -> None:
    module, inputs = network.perturbed(), network.inputs()
    with torch.no_grad():
        singles = [network.call(module, *(x[i : i + 1] for x in inputs)) for i in range(len(inputs[0]))]
        assert_near(network.call(module, *inputs), torch.cat(singles), 1e-5)


def test_quantized_latents_are_codes() -> None:
    module = NETWORKS["vqgan"].perturbed()
    assert isinstance(module, VQGAN)
    with torch.no_grad():
        quantized = module.quantize(module.encode(NETWORKS["vqgan"].inputs()[0]))
        codes = module.vquantizer.codebook(quantized.indices).permute(0, 3, 1, 2)
        assert_near(quantized.latents, codes, 1e-6)
        assert_near(module.decode(codes), module.decode(module.indices_to_latents(quantized.indices)), 0)
    assert quantized.indices.unique().numel() > 1 and int(quantized.indices.max()) < VQ.codebook_size


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("kind", [Attention, FeedForwardBlock])
def test_dropout_is_active_in_training_only(kind: type[Attention | FeedForwardBlock], grad: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 6, 8) if kind is Attention else torch.randn(1, 8, 3, 2)
    block = Attention(8, 2, dropout=0.5) if kind is Attention else FeedForwardBlock(8, dropout=0.5)

    def run() -> Tensor:
        return block(x, block.keys_values(x)) if isinstance(block, Attention) else block(x)

    with torch.set_grad_enabled(grad):
        assert not torch.equal(run(), run())
        block.eval()
        assert torch.equal(run(), run())


@pytest.mark.parametrize("name", ["prior", "decoder", "token_decoder"])
def test_dropout_in_attention_and_in_mlps(name: str) -> None:
    """As in the original; each of them alone makes the output random, and without both it is deterministic."""
    base = NETWORKS[name].perturbed()
    network = type(base)(replace(base.params, dropout=0.1))
    network.load_state_dict(base.state_dict())
    attention = [module for module in network.modules() if isinstance(module, MultiHeadAttention)]
    mlps = [module for module in network.modules() if isinstance(module, nn.Dropout)]
    assert attention and all(module.dropout == 0.1 for module in attention)
    assert len(mlps) >= len(attention) and all(module.p == 0.1 for module in mlps)

    def is_random() -> bool:
        one, other = (NETWORKS[name].call(network.train(), *NETWORKS[name].inputs()) for _ in range(2))
        return not torch.equal(one, other)

    for rates in ((0.1, 0.0), (0.0, 0.1), (0.0, 0.0)):
        for module in attention:
            module.dropout = rates[0]
        for mlp_dropout in mlps:
            mlp_dropout.p = rates[1]
        assert is_random() == any(rates)


def test_no_random_numbers_on_the_meta_device(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    def draw(*_: object, **__: object) -> None:
        raise AssertionError("torch imports its compiler for this")

    monkeypatch.setattr(nn.init, "normal_", draw)
    with torch.device("meta"):
        network.build()
