"""The noise schedule against the original's tables, named time schedules, and picture sizes."""

from __future__ import annotations

import pytest
import torch
from helpers.golden_data import Golden, assert_near

from wuerstchen_core.common.geometry import check_size, decoder_side, nearest_legal, prior_side
from wuerstchen_core.diffusion.samplers import SAMPLERS
from wuerstchen_core.diffusion.schedule import (
    SCHEDULES,
    alpha_bar,
    decoder_times,
    diffuse,
    linear_times,
    named_times,
    p2_weight,
    strength_times,
    training_times,
    two_part_times,
)

TOLERANCE = 1e-6  # observed 2e-7


@pytest.fixture(scope="module")
def golden() -> Golden:
    return Golden("schedule_tables")


def test_alpha_bar_and_p2_weight(golden: Golden) -> None:
    assert_near(alpha_bar(golden["in/t"]), golden["out/alpha_cumprod_scaler1"], TOLERANCE)
    assert_near(p2_weight(golden["in/t"]), golden["out/p2_weight_scaler1"], TOLERANCE)


def test_the_cached_table_of_the_original(golden: Golden) -> None:
    """The original can read alpha_bar from a table of 1000 entries, at the index floor(t * 999)."""
    table = alpha_bar(torch.linspace(0, 1, 1000))
    index = (golden["in/t"] * 999).long()
    assert_near(table[index], golden["out/alpha_cumprod_cache1000"], TOLERANCE)


def test_alpha_bar_in_half_precision_stays_in_bounds() -> None:
    t = torch.linspace(0, 1, 101)
    for dtype in (torch.float16, torch.bfloat16):
        assert alpha_bar(t.to(dtype)).isfinite().all()


def test_diffuse(golden: Golden) -> None:
    noised = diffuse(golden["in/x0"], golden["in/t4"], golden["in/noise"])
    assert_near(noised, golden["out/diffused"], TOLERANCE)


def test_training_times(golden: Golden) -> None:
    assert_near(training_times(golden["in/train_uniform"]), golden["out/train_t"], TOLERANCE)
    fraction = training_times(torch.rand(100_000, generator=torch.Generator().manual_seed(0))).eq(1).float().mean()
    assert float(fraction) == pytest.approx(0.075, abs=0.005)


def test_published_schedules() -> None:
    original, diffusers = named_times("original", 5), named_times("diffusers", 5)
    assert float(original[20]) == float(diffusers[19]) == pytest.approx(2 / 3)
    assert_near(diffusers, Golden("diffusers_v2_small")["scheduler/default_stage_c_timesteps_f32"], 2e-7)
    fast = named_times("fast", 5)
    assert fast.tolist() == pytest.approx([(1 - i / 6) ** 2 for i in range(7)], abs=1e-7)
    for name in ("linear", "turbo"):
        assert torch.equal(named_times(name, 5), linear_times(5))


def test_a_single_step_of_stage_b_starts_below_noise() -> None:
    assert torch.equal(decoder_times(2), linear_times(2))
    assert torch.equal(decoder_times(2, 0.99), strength_times(linear_times(2), 0.99))
    for strength, start in ((1.0, 0.95), (0.96, 0.95), (0.95, 0.95), (0.5, 0.5), (0.0, 0.0)):
        assert torch.equal(decoder_times(1, strength), torch.tensor([start, 0.0]))


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_falls_from_noise_to_the_picture(name: str) -> None:
    schedule, times = SCHEDULES[name], named_times(name, 12)
    assert len(times) - 1 == (schedule.steps or 12)
    assert times[0] == 1 and times[-1] == 0 and (times.diff() < 0).all()
    assert schedule.sampler in SAMPLERS


def test_any_number_of_steps_in_two_parts() -> None:
    for steps in (1, 2, 7):
        assert len(two_part_times(steps)) == steps + 1 and (two_part_times(steps).diff() < 0).all()


def test_unknown_schedules_and_numbers_of_steps() -> None:
    with pytest.raises(ValueError, match="'karras'.*original, diffusers, linear, fast"):
        named_times("karras", 5)
    for steps in (0, 10_001):
        with pytest.raises(ValueError, match=f"{steps} .*steps"):
            linear_times(steps)


def test_sides_of_latents() -> None:
    for pixels, prior in ((64, 2), (128, 3), (256, 6), (512, 12), (1024, 24), (1088, 26)):
        assert prior_side(pixels) == prior and decoder_side(pixels) == pixels / 4


@pytest.mark.parametrize(
    ("size", "legal"),
    [((1000, 1024), "1024x1024"), ((1024, 10), "1024x64"), ((2112, 5000), "2048x2048"), ((0, -64), "64x64")],
)
def test_illegal_sizes(size: tuple[int, int], legal: str) -> None:
    with pytest.raises(ValueError, match=f"{size[0]}x{size[1]} .*{legal}$"):
        check_size(*size)


def test_every_multiple_of_64_is_legal() -> None:
    for side in range(64, 2049, 64):
        check_size(side, 2112 - side)
        assert nearest_legal(side) == side == nearest_legal(side + 31) == nearest_legal(side - 32)
