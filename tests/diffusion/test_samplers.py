"""Samplers: the original's trajectories, exact solutions, masks and seeds."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.golden_data import Golden, assert_near
from helpers.networks import NETWORKS
from helpers.recorded_noise import recorder, replay
from torch import Tensor

from wuerstchen_core.diffusion.samplers import (
    SAMPLERS,
    Denoiser,
    guided,
    predict_x0,
    sample,
    seeded_noise,
)
from wuerstchen_core.diffusion.schedule import alpha_bar, diffuse, expand, linear_times, squared_times

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
    noises = list(golden[f"{run}/step_noise"]) if config["sampler"] == "ddpm" else []
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
        sampler=config["sampler"],
        init=init,
        mask=mask,
        callback=recorder(seen),
    )
    assert_near(torch.stack(seen), golden[f"{run}/preds"], RUNS[run])
    assert torch.equal(end, seen[-1])


def oracle(picture: Tensor) -> Denoiser:
    """Returns a denoiser that computes the noise in x from the known picture."""

    def noise_in(x: Tensor, t: Tensor) -> Tensor:
        signal = expand(alpha_bar(t), x)
        return (x - signal.sqrt() * picture) / (1 - signal).sqrt()

    return noise_in


# The schedule ends at 0.9999, not at 1: ddim leaves a hundredth of the noise, ddpm its mean.
REMAINING_NOISE = 0.06


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("times", [linear_times(7, start=0.7), squared_times(6)])
def test_every_sampler_reaches_the_known_picture(name: str, times: Tensor) -> None:
    picture, noise = torch.randn(2, 4, 3, 5), torch.randn(2, 4, 3, 5)
    x = diffuse(picture, times[:1].expand(2), noise)
    out = sample(oracle(picture), x, times, draw=seeded_noise(0, 2), sampler=name)
    assert (out - picture).abs().max() < REMAINING_NOISE


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_mask_keeps_the_rest_of_the_picture(name: str) -> None:
    picture, x, times = torch.randn(1, 4, 6, 6), torch.randn(1, 4, 6, 6), linear_times(7)
    mask = torch.zeros(1, 1, 6, 6)
    mask[..., 3:] = 1
    known = torch.cat([picture[..., :3], torch.randn(1, 4, 6, 3)], dim=-1)  # its left half is kept
    masked = sample(
        oracle(known), x, times, draw=replay(*[x] * 14), sampler=name, init=picture, mask=mask, kept_noise=x
    )
    assert (masked - known).abs().max() < REMAINING_NOISE
    free = sample(oracle(known), x, times, draw=replay(*[x] * 14), sampler=name)
    assert torch.equal(masked[..., 3:], free[..., 3:])


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("value", [0.0, 0.3, 0.8])
def test_a_soft_mask_mixes_the_picture_and_the_prediction_by_its_value(name: str, value: float) -> None:
    picture, known, x = (torch.randn(2, 4, 6, 6) for _ in range(3))
    times, mask = linear_times(7, start=0.7), torch.full((1, 1, 6, 6), value)
    start = diffuse(picture, times[:1].expand(2), x)
    run = {"draw": seeded_noise(0, 2), "sampler": name, "init": picture, "mask": mask, "kept_noise": x}
    out = sample(oracle(known), start, times, **run)
    torch.testing.assert_close(out, known * value + picture * (1 - value), rtol=0, atol=1e-4)


DEVIATION = 0.5  # of Gaussian pictures with mean 0, for which the solution of the probability-flow ODE is known


def expected_noise(x: Tensor, t: Tensor) -> Tensor:
    """Returns the expected noise in x, for Gaussian pictures."""
    signal = expand(alpha_bar(t), x)
    return x * (1 - signal).sqrt() / (signal * DEVIATION**2 + 1 - signal)


def ode_error(sampler: str, steps: int) -> float:
    """Returns a sampler's distance from the exact solution at t = 0.1, started at t = 0.9."""
    x, times = torch.ones(1, 1, 1, 1, dtype=torch.float64), linear_times(steps, 0.9, 0.1).double()
    start, end = (alpha_bar(t) * DEVIATION**2 + 1 - alpha_bar(t) for t in (times[0], times[-1]))
    out = sample(expected_noise, x, times, draw=seeded_noise(0, 1), sampler=sampler)
    return float((out - (end / start).sqrt()).abs())


@pytest.mark.parametrize(("sampler", "order"), [("ddim", 1), ("dpmpp_2m", 2)])
def test_order_of_convergence(sampler: str, order: int) -> None:
    assert math.log2(ode_error(sampler, 128) / ode_error(sampler, 256)) == pytest.approx(order, abs=0.1)


def test_second_order_is_more_accurate() -> None:
    assert ode_error("dpmpp_2m", 32) < ode_error("ddim", 32) / 10


def test_dpmpp_2m_follows_the_papers_algorithm() -> None:
    """Written out after arXiv 2211.01095, algorithm 2, in double precision; the last step is of first order."""
    times = squared_times(5).double()
    x = start = torch.randn(1, 4, 3, 5, dtype=torch.float64)
    noises, clean, widths = [], [], []
    for i in range(5):
        a, a_next = float(alpha_bar(times[i])), float(alpha_bar(times[i + 1]))
        noises.append(expected_noise(x, times[i : i + 1]) + 0.1 * x.cos())
        clean.append((x - math.sqrt(1 - a) * noises[i]) / math.sqrt(a))
        half_log_snr = [math.log(math.sqrt(b) / math.sqrt(1 - b)) for b in (a, a_next)]
        widths.append(half_log_snr[1] - half_log_snr[0])
        target = clean[i]
        if 0 < i < 4:
            r = widths[i - 1] / widths[i]
            target = (1 + 1 / (2 * r)) * clean[i] - 1 / (2 * r) * clean[i - 1]
        x = math.sqrt((1 - a_next) / (1 - a)) * x - math.sqrt(a_next) * (math.exp(-widths[i]) - 1) * target
    out = sample(
        lambda x, t: expected_noise(x, t) + 0.1 * x.cos(), start, times, draw=seeded_noise(0, 1), sampler="dpmpp_2m"
    )
    assert_near(out, x, 1e-9)
    first_order = sample(
        lambda x, t: expected_noise(x, t) + 0.1 * x.cos(), start, times, draw=seeded_noise(0, 1), sampler="ddim"
    )
    assert not torch.allclose(out, first_order, atol=1e-3)


@pytest.mark.parametrize("name", SAMPLERS)
def test_runs_are_independent(name: str) -> None:
    def run(picture: Tensor) -> Tensor:
        return sample(oracle(picture), x, squared_times(4), draw=seeded_noise(0, 2), sampler=name)

    x, picture = torch.randn(2, 4, 3, 5), torch.randn(2, 4, 3, 5)
    first = run(picture)
    run(picture + 3)
    assert torch.equal(run(picture), first)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("times", [linear_times(2000), squared_times(6).repeat_interleave(2)], ids=["many", "repeated"])
def test_steps_without_width_stay_finite(name: str, times: Tensor) -> None:
    """alpha_bar is clamped at both ends, so that neighbouring times can have the same noise."""
    out = sample(expected_noise, torch.randn(1, 4, 3, 5), times, draw=seeded_noise(0, 1), sampler=name)
    assert out.isfinite().all() and out.abs().max() < 10


def test_unknown_samplers_are_refused() -> None:
    with pytest.raises(ValueError, match="'euler'.*ddpm, ddim, dpmpp_2m"):
        sample(expected_noise, torch.zeros(1, 1, 1, 1), linear_times(2), draw=seeded_noise(0, 1), sampler="euler")


def test_the_callback_sees_the_denoised_and_can_stop() -> None:
    picture = torch.randn(1, 4, 3, 5)
    seen: list[tuple[int, int]] = []

    def stop_at_the_third(step: int, steps: int, x: Tensor, denoised: Tensor) -> None:
        seen.append((step, steps))
        assert_near(denoised, picture, 1e-2)
        if step == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        x = torch.randn(1, 4, 3, 5)
        sample(oracle(picture), x, linear_times(5), draw=seeded_noise(0, 1), callback=stop_at_the_third)
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
    with pytest.raises(ValueError, match="init and mask"):
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


@pytest.mark.parametrize("name", SAMPLERS)
def test_pictures_of_a_batch_equal_their_singles(name: str) -> None:
    network = NETWORKS["prior"]
    prior, (latents, _, text) = network.perturbed(), network.inputs()

    def run(first: int, count: int) -> Tensor:
        draw, rows = seeded_noise(40 + first, count), slice(first, first + count)
        cond, uncond = text[rows], torch.zeros_like(text[rows])
        with torch.no_grad():
            denoiser, x = guided(prior, (cond,), (uncond,), 2.0), draw(latents[rows])
            return sample(denoiser, x, linear_times(4), draw=draw, sampler=name)

    together = run(0, 3)
    assert_near(together, torch.cat([run(i, 1) for i in range(3)]), 1e-4)
    assert not torch.allclose(together[0], together[1], atol=0.1)
