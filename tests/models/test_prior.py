"""The prior against outputs of the original code, its initialisation and its key-value cache."""

from __future__ import annotations

import pytest
import torch
from helpers.golden_data import Golden, assert_near
from helpers.networks import NETWORKS, PRIOR
from torch import Tensor

from wuerstchen_core.checkpoints.key_maps import split_attention
from wuerstchen_core.diffusion.schedule import diffuse, training_times
from wuerstchen_core.models.layers import timestep_embedding
from wuerstchen_core.models.prior import KVCache, Prior, PriorParams, latents_from_features
from wuerstchen_core.training.ema import EMA
from wuerstchen_core.training.optim import build_optimizers
from wuerstchen_core.training.stages.losses import NoiseConfig, noise_loss

pytestmark = pytest.mark.usefixtures("kernels")
TOLERANCE = 1e-5  # observed 1e-6


@pytest.fixture(scope="module")
def golden() -> Golden:
    return Golden("prior_small")


@pytest.fixture(scope="module")
def prior(golden: Golden) -> Prior:
    network = Prior(PriorParams(**golden.sizes())).eval().requires_grad_(False)
    network.load_state_dict(golden.weights())
    return network


@pytest.mark.parametrize("time", ["t0", "t05", "t1", "tmix"])
def test_noise(golden: Golden, prior: Prior, time: str) -> None:
    out = prior(golden["in/x"], golden[f"in/r_{time}"], golden["in/c"])
    assert_near(out, golden[f"out/eps_{time}"], TOLERANCE)


def test_noise_at_the_real_latent_size(golden: Golden, prior: Prior) -> None:
    out = prior(golden["in/x_24"], golden["in/r_24"], golden["in/c_24"])
    assert_near(out, golden["out/eps_24x24_77tok"], TOLERANCE)


def test_every_block(golden: Golden, prior: Prior) -> None:
    seen: dict[str, Tensor] = {}
    layers = {f"trace_block{i}_tmix": block for i, block in enumerate(prior.blocks)} | {"raw_ab_tmix": prior.out}
    hooks = [
        layer.register_forward_hook(lambda module, inputs, out, name=name: seen.update({name: out}))
        for name, layer in layers.items()
    ]
    prior(golden["in/x"], golden["in/r_tmix"], golden["in/c"])
    for hook in hooks:
        hook.remove()
    assert len(seen) == 7
    for name, out in seen.items():
        assert_near(out, golden[f"out/{name}"], TOLERANCE)


def test_a_training_step(golden: Golden) -> None:
    """The original's loss, gradients, AdamW step and EMA."""
    step = Golden("prior_train_step")
    prior = Prior(PriorParams(**golden.sizes())).eval()  # without dropout, like the golden run
    prior.load_state_dict(golden.weights())
    t = training_times(step["in/uniform"])
    assert_near(t, step["out/t"], 1e-6)
    noised = diffuse(latents_from_features(step["in/features"]), t, step["in/noise"])
    assert_near(noised, step["out/noised"], TOLERANCE)
    predicted = prior(noised, t, step["in/c"])
    assert_near(predicted, step["out/pred"], TOLERANCE)
    loss = noise_loss(NoiseConfig(weight="p2"), predicted, step["in/noise"], t)
    assert_near(loss, step["out/loss_adjusted"], 1e-6)
    loss.backward()
    gradients = split_attention(step.under("grad/"))
    assert len(gradients) == 12
    for name, expected in gradients.items():
        gradient = prior.get_parameter(name).grad
        assert gradient is not None
        assert_near(gradient, expected, 2e-7)  # observed 2e-8
    average = EMA(prior, step.config["ema_beta"])
    optimizers = build_optimizers(prior, torch.device("cpu"))
    optimizers["adamw"].param_groups[0].update(step.config["adamw"])
    assert_near(torch.nn.utils.clip_grad_norm_(prior.parameters(), step.config["clip"]), step["out/grad_norm"], 1e-6)
    optimizers["adamw"].step()
    average.update(prior, first=False)
    for group, found in (("after_adamw/", prior.state_dict()), ("ema_after/", average.values)):
        expected = step.under(group)
        assert len(expected) == 2
        for name, x in expected.items():
            assert_near(found[name], x, 1e-7)  # observed 2e-8; the average moves by 1e-5


@pytest.mark.parametrize("width", [64, 16, 9])
def test_timestep_embedding(width: int) -> None:
    golden = Golden("timestep_embedding")
    # Another order of the products moves the phase by 5e-4.
    assert_near(timestep_embedding(golden["in/r"], width), golden[f"out/c_r{width}"], 1e-6)


def test_timestep_embedding_takes_half_precision_times_in_fp32() -> None:
    t = torch.tensor([0.5, 1.0])  # exact in bf16
    assert torch.equal(timestep_embedding(t.bfloat16(), 64), timestep_embedding(t, 64))


def test_initial_weights() -> None:
    torch.manual_seed(0)
    prior = Prior(PriorParams(c=64, c_cond=32, depth=4, nhead=1))
    prior.init_weights()
    assert not prior.out[1].weight.any()
    assert not any(p.any() for name, p in prior.named_parameters() if name.endswith((".bias", ".gamma", ".beta")))
    for layer in (prior.projection, prior.cond_mapper[0], prior.cond_mapper[2]):
        assert float(layer.weight.detach().std()) == pytest.approx(0.02, rel=0.1)
    conv, time, attention = prior.blocks[:3]
    assert not time.mapper.weight.any()
    bounds = {
        conv.channelwise[0].weight: (6 / (64 + 256)) ** 0.5,
        conv.channelwise[-1].weight: (6 / (64 + 256)) ** 0.5 * (1 / 4) ** 0.5,  # shrunk by the depth
        attention.kv_mapper[1].weight: (6 / 128) ** 0.5,
        attention.attention.to_q.weight: (6 / (64 + 3 * 64)) ** 0.5,  # as one matrix with to_k and to_v
        attention.attention.to_out[0].weight: (6 / 128) ** 0.5,
    }
    for weight, bound in bounds.items():
        assert 0.95 * bound < float(weight.detach().abs().max()) <= bound


def test_kv_cache_computes_each_text_once() -> None:
    module = NETWORKS["prior"].perturbed()
    assert isinstance(module, Prior)
    latents, t, text = NETWORKS["prior"].inputs()
    calls = []
    module.cond_mapper.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        expected, expected_other = module(latents, t, text), module(latents, t, text + 1)
        calls.clear()
        cache = KVCache(module)
        for _ in range(3):  # both texts of guidance in turn, each time as a new tensor
            assert torch.equal(module(latents, t, cache(text.clone())), expected)
            assert torch.equal(module(latents, t, cache(text + 1)), expected_other)
        assert len(calls) == 2
        assert len(cache(text)) == PRIOR.depth
