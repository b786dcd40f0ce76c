"""Training with the batch norms of inference, and the other options of Stage A: noisy latents, weights of losses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from wuerstchen_core.training.rng import StepRandom
from wuerstchen_core.training.stage import Stage
from wuerstchen_core.training.stages.image_encoder import EncoderStage
from wuerstchen_core.training.stages.norms import RunningNorms
from wuerstchen_core.training.stages.vqgan import Autoencoder, VQGANStage

pytest.importorskip("resvg_py", reason="drawing needs resvg-py")

MODEL = {"bottleneck_blocks": 1, "c_hidden": 16, "codebook_size": 32}
OPTIONS = {"crop": 32, "margin": 0, "quantize_from": 2}
CROPS = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def stage(**options: float) -> VQGANStage:
    torch.manual_seed(0)
    config = {"data": {"canvas": 64, "things": 2}, "model": MODEL, "vqgan": {**OPTIONS, **options}}
    made = VQGANStage(config)
    made.net.train()
    return made


def loss(
    net: Autoencoder,
    *crops: torch.Tensor,
    noise: torch.Tensor | None = None,
    running: bool = True,
    coded: int | None = None,
) -> float:
    """Returns the loss of crops, of which `coded` are quantized, and keeps the statistics."""
    before = {key: x.clone() for key, x in net.state_dict().items()}
    with torch.no_grad():
        found = float(net(torch.stack(crops), coded, False, noise=noise, running_norm=running))
    net.load_state_dict(before)
    return found


@pytest.mark.parametrize("running", [True, False])
def test_the_loss_of_a_crop_depends_on_the_others_only_by_the_batchs_statistics(running: bool) -> None:
    net = stage(norm_steps=2).net
    first, second = CROPS
    both, mean = loss(net, first, second, running=running), (loss(net, first) + loss(net, second)) / 2
    assert (abs(both - mean) < 1e-6) == running


def test_statistics_follow_the_latents_in_training() -> None:
    trained = stage(norm_steps=2)
    norm, rng = trained.net.vqgan.down_blocks[-1][1], StepRandom(0, 0, 4)
    picked = trained.dataset.sample_batch(rng)
    for step in (0, 2, 3):
        mean, var = norm.running_mean.clone(), norm.running_var.clone()
        trained.loss(trained.net, *trained.prepare(picked, step, rng)).backward()
        assert trained.net.norms.active == (step >= 2)
        assert not torch.equal(norm.running_mean, mean) and not torch.equal(norm.running_var, var)


def test_results_are_those_of_inference_and_gradients_do_not_change_the_scale() -> None:
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1, bias=False), torch.nn.BatchNorm2d(4)).train()
    torch.nn.init.uniform_(net[1].weight)
    norms, images = RunningNorms(net), 100 * torch.rand(3, 3, 8, 8)
    net(100 * torch.rand(5, 3, 8, 8))
    norms.use(True)
    found = net(images)
    assert torch.allclose(found, net.eval()(images), atol=1e-5)
    (found**3).sum().backward()
    scales = (net[0].weight.grad * net[0].weight).sum(dim=(1, 2, 3))
    assert scales.abs().max() < 1e-3 * net[0].weight.grad.abs().max()
    norms.use(False)
    assert not torch.allclose(net.train()(images), net.eval()(images), atol=1e-3)


def test_noise_is_drawn_for_each_image_and_added_to_what_is_not_quantized() -> None:
    trained = stage(noise=0.5)
    rng = StepRandom(0, 0, 64)
    *_, noise = trained.prepare(trained.dataset.sample_batch(rng), 0, rng)
    strengths = noise.flatten(1).std(dim=1)
    assert noise.shape == (64, 4, 8, 8) and strengths.min() < 0.1 and 0.4 < strengths.max() < 0.6
    assert loss(trained.net, *CROPS) != loss(trained.net, *CROPS, noise=noise[:2])
    assert loss(trained.net, *CROPS, coded=2) == loss(trained.net, *CROPS, noise=noise[:2], coded=2)
    *_, none = stage().prepare(trained.dataset.sample_batch(rng), 0, rng)
    assert none is None


@pytest.mark.parametrize("name", ["commit", "absolute"])
def test_the_weights_of_the_commitment_loss_and_of_absolute_errors(name: str) -> None:
    losses = []
    for weight in (0.0, 0.25, 0.5):
        with torch.no_grad():
            losses.append(float(stage(**{name: weight}).net(CROPS, 1, False, running_norm=True)))
    assert losses[0] < losses[1] and losses[2] - losses[1] == pytest.approx(losses[1] - losses[0], rel=1e-3)


@pytest.mark.parametrize(("kind", "scale"), [(VQGANStage, "down_blocks.3.1.weight"), (EncoderStage, "mapper.1.weight")])
def test_noise_does_not_make_the_latents_of_a_fine_tune_grow(kind: type[Stage[Any]], scale: str) -> None:
    net = kind({"start": "demo", "data": {"things": 2}}).net
    fixed = {name for name, parameter in net.named_parameters() if not parameter.requires_grad}
    assert any(name.endswith(scale) for name in fixed)


@pytest.mark.parametrize("running", [True, False])
def test_the_image_encoder_can_be_trained_with_running_statistics_too(running: bool) -> None:
    stages = [["fused", 1, 3, 2, 8, 8, 1]] * 4
    config = {"data": {"canvas": 64, "things": 2}, "model": {"stages": stages, "last_channel": 8}}
    torch.manual_seed(0)
    encoder = EncoderStage({**config, "encoder": {"widths": [8], "norm_steps": 3}})
    net, rng = encoder.net.train(), StepRandom(0, 0, 4)
    batch = encoder.prepare(encoder.dataset.sample_batch(rng), 3 if running else 2, rng)
    norms = [module for module in net.image_encoder.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    before = [norm.running_var.clone() for norm in norms]
    encoder.loss(net, *batch).backward()
    assert net.norms.active == running and len(norms) == 7
    assert not any(torch.equal(norm.running_var, var) for norm, var in zip(norms, before, strict=True))
