"""The samplers against the original's trajectories, and the seeds' promise."""

from __future__ import annotations

import pytest
import torch
from helpers.golden_data import Golden, assert_near
from helpers.networks import NETWORKS
from helpers.recorded_noise import recorder, replay
from torch import Tensor

from wuerstchen_core.diffusion.samplers import (
    STEPS,
    ddim_step,
    ddpm_step,
    guided,
    predict_x0,
    sample,
    seeded_noise,
)
from wuerstchen_core.diffusion.schedule import alpha_bar, diffuse, linear_times

UNGUIDED, GUIDED = 2e-5, 2e-4  # observed 4e-6, and 2e-4 of 40 (a closed-form model that blows up under guidance)

RUNS = {
    "ddpm_nocfg": UNGUIDED,
    "ddpm_end0p5": UNGUIDED,
    "ddpm_cfg4": GUIDED,
    "ddpm_cfg4_zero_uncond": GUIDED,
    "ddim_cfg4": GUIDED,
    "ddpm_xinit_from0p7": UNGUIDED,  # guided, but does not start from t = 1
    "ddpm_mask": GUIDED,
}


@pytest.fixture(scope="module")
def golden() -> Golden:
    return Golden("diffuzz_trajectories")


def model(x: Tensor, t: Tensor, c: Tensor) -> Tensor:
    return (0.6 + 0.4 * t[:, None, None, None]) * x + 0.3 * torch.sin(x + c)


@pytest.mark.parametrize("run", RUNS)
def test_trajectory(golden: Golden, run: str) -> None:
    config = golden.config[run]
    c, c_uncond = golden["in/c"], golden["in/c_uncond"]
    uncond = torch.zeros_like(c) if run == "ddpm_cfg4_zero_uncond" else c_uncond
    step = STEPS[config["sampler"]]
    noises = list(golden[f"{run}/step_noise"]) if step is ddpm_step else []
    start = golden["in/x_init" if run == "ddpm_xinit_from0p7" else f"{run}/x_T"]
    times = linear_times(config["timesteps"], config.get("t_start", 1.0), config.get("t_end", 0.0))
    assert_near(times, golden[f"{run}/t"], 2e-7)
    init, mask = None, None
    if run == "ddpm_mask":
        init, mask = golden["in/x_init"], golden["in/mask"]
        noises = [noise for pair in zip(golden[f"{run}/renoise"], noises, strict=True) for noise in pair]
    seen: list[Tensor] = []
    end = sample(
        guided(model, (c,), (uncond,), config["cfg"] or 1.0),
        start,
        times,
        draw=replay(*noises),
        step=step,
        init=init,
        mask=mask,
        callback=recorder(seen),
    )
    assert_near(torch.stack(seen), golden[f"{run}/preds"], RUNS[run])
    assert torch.equal(end, seen[-1])


def test_start_from_a_picture() -> None:
    """With a model that knows the noise, any start leads back to the picture."""
    picture, noise = torch.randn(2, 4, 3, 5), torch.randn(2, 4, 3, 5)
    times = linear_times(7, start=0.7)

    def oracle(x: Tensor, t: Tensor) -> Tensor:
        signal = alpha_bar(t)[:, None, None, None]
        return (x - signal.sqrt() * picture) / (1 - signal).sqrt()

    x = diffuse(picture, times[:1].expand(2), noise)
    for step in (ddim_step, ddpm_step):
        out = sample(oracle, x, times, draw=seeded_noise(0, 2), step=step)
        # The schedule ends at 0.9999, not at 1: a hundredth of the noise is left by DDIM, its mean by DDPM.
        assert (out - picture).abs().max() < 0.06


def test_the_callback_sees_the_denoised_and_can_stop() -> None:
    picture = torch.randn(1, 4, 3, 5)
    seen: list[tuple[int, int]] = []

    def oracle(x: Tensor, t: Tensor) -> Tensor:
        signal = alpha_bar(t)[:, None, None, None]
        return (x - signal.sqrt() * picture) / (1 - signal).sqrt()

    def stop_at_the_third(step: int, steps: int, x: Tensor, denoised: Tensor) -> None:
        seen.append((step, steps))
        assert_near(denoised, picture, 1e-2)
        if step == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        sample(oracle, torch.randn(1, 4, 3, 5), linear_times(5), draw=seeded_noise(0, 1), callback=stop_at_the_third)
    assert seen == [(0, 5), (1, 5), (2, 5)]


def test_predict_x0_undoes_diffuse() -> None:
    x0, noise, t = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2), torch.tensor([0.1, 0.5, 0.9])
    assert_near(predict_x0(diffuse(x0, t, noise), noise, t), x0, 1e-4)


def test_guidance() -> None:
    x, t, c, c_uncond = torch.randn(2, 4, 3, 5), torch.rand(2), torch.randn(2, 4, 3, 5), torch.randn(2, 4, 3, 5)
    cond, uncond = model(x, t, c), model(x, t, c_uncond)
    assert_near(guided(model, (c,), (c_uncond,), 3.0)(x, t), uncond + 3 * (cond - uncond), 1e-5)
    calls: list[int] = []

    def counted(x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        calls.append(len(x))
        return model(x, t, c)

    assert torch.equal(guided(counted, (c,), (c_uncond,), 1.0)(x, t), cond)
    assert calls == [2]  # the unconditional half is not computed


def test_init_without_mask_is_refused() -> None:
    x = torch.zeros(1, 1, 1, 1)
    with pytest.raises(ValueError, match="init and mask belong together"):
        sample(lambda x, t: x, x, linear_times(2), draw=seeded_noise(0, 1), init=x)


def test_noise_of_a_batch_equals_its_singles() -> None:
    like = torch.empty(3, 4, 2, 5)
    batch, singles = seeded_noise(7, 3), [seeded_noise(7 + i, 1) for i in range(3)]
    for _ in range(2):
        assert torch.equal(batch(like), torch.cat([single(like[:1]) for single in singles]))
    assert not torch.equal(batch(like)[0], batch(like)[0])


def test_pictures_taken_from_a_batch_keep_their_noise() -> None:
    like = torch.empty(3, 4, 2, 5)
    batch, taken = seeded_noise(7, 3), seeded_noise(7, [2, 0])
    for _ in range(2):
        assert torch.equal(taken(like[:2]), batch(like)[[2, 0]])


def test_pictures_of_a_batch_equal_their_singles() -> None:
    network = NETWORKS["prior"]
    prior, (latents, _, text) = network.perturbed(), network.inputs()

    def paint(first: int, count: int) -> Tensor:
        draw, rows = seeded_noise(40 + first, count), slice(first, first + count)
        cond, uncond = text[rows], torch.zeros_like(text[rows])
        with torch.no_grad():
            return sample(guided(prior, (cond,), (uncond,), 2.0), draw(latents[rows]), linear_times(4), draw=draw)

    together = paint(0, 3)
    assert_near(together, torch.cat([paint(i, 1) for i in range(3)]), 1e-4)
    assert not torch.allclose(together[0], together[1], atol=0.1)
