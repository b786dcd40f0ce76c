"""Interpolation, schedules scaled by a strength, and masks on latent grids."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.golden_data import assert_near

from wuerstchen_core.diffusion.interpolate import PICTURE, TOKEN, slerp
from wuerstchen_core.diffusion.masks import latent_mask
from wuerstchen_core.diffusion.schedule import linear_times, strength_times, two_part_times


def test_slerp_rotates_and_scales_evenly() -> None:
    a, b = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 5.0]])
    for fraction in (0.25, 0.5, 0.9):
        angle, length = fraction * math.pi / 2, 3 + 2 * fraction
        assert_near(slerp(a, b, fraction, TOKEN), length * torch.tensor([[math.cos(angle), math.sin(angle)]]), 1e-6)


@pytest.mark.parametrize("dims", [PICTURE, TOKEN])
def test_slerp_ends_at_its_ends(dims: tuple[int, ...]) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.randn(2, 4, 3, 5).to(dtype), torch.randn(2, 4, 3, 5).to(dtype)
        assert torch.equal(slerp(a, b, 0.0, dims), a) and torch.equal(slerp(a, b, 1.0, dims), b)
        assert slerp(a, b, 0.5, dims).dtype == dtype
    assert_near(slerp(a.float(), b.float(), 0.3, dims), slerp(b.float(), a.float(), 0.7, dims), 1e-5)


def test_slerp_of_pictures_and_of_tokens() -> None:
    a, b = torch.randn(2, 4, 3, 5), torch.randn(2, 4, 3, 5)
    assert_near(slerp(a, b, 0.4)[1:], slerp(a[1:], b[1:], 0.4), 1e-6)
    assert_near(slerp(a, b, 0.4, TOKEN)[:, 1:, 2:], slerp(a[:, 1:, 2:], b[:, 1:, 2:], 0.4, TOKEN), 1e-6)
    assert not torch.allclose(slerp(a, b, 0.4), slerp(a, b, 0.4, TOKEN), atol=1e-3)


@pytest.mark.parametrize("factor", [0.0, 1.0, 2.0, -1.0, -0.5])
def test_parallel_vectors_are_interpolated_linearly(factor: float) -> None:
    a = torch.randn(2, 4, 3, 5)
    assert_near(slerp(a, factor * a, 0.25), a * (0.75 + 0.25 * factor), 1e-5)


def test_invalid_interpolations() -> None:
    with pytest.raises(ValueError, match="1x16x6x6 and 1x16x3x6"):
        slerp(torch.zeros(1, 16, 6, 6), torch.zeros(1, 16, 3, 6), 0.5)
    for fraction in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=f"fraction {fraction} "):
            slerp(torch.zeros(1), torch.ones(1), fraction, TOKEN)


def test_strength_times() -> None:
    assert_near(strength_times(linear_times(4), 0.5), torch.tensor([0.5, 0.375, 0.25, 0.125, 0.0]), 1e-7)
    for times in (linear_times(7), two_part_times(30)):
        assert torch.equal(strength_times(times, 1.0), times)
        assert len(strength_times(times, 0.3)) == len(times) and not strength_times(times, 0.0).any()
    for strength in (-0.1, 1.01, math.nan):
        with pytest.raises(ValueError, match="strength"):
            strength_times(linear_times(3), strength)


@pytest.mark.parametrize(
    ("pixel", "cells"),
    [((0, 0), [(0, 0)]), ((41, 127), [(0, 2)]), ((42, 100), [(0, 2), (1, 2)]), ((43, 85), [(1, 1), (1, 2)])],
)
def test_one_pixel_masks_every_cell_that_it_touches(pixel: tuple[int, int], cells: list[tuple[int, int]]) -> None:
    """128 pixels are three cells of 42.67: pixel 42 lies in the first and second cell, 85 in the last two."""
    mask = torch.zeros(1, 1, 128, 128)
    mask[0, 0][pixel] = 1
    assert sorted(map(tuple, latent_mask(mask, 3, 3)[0, 0].nonzero().tolist())) == cells


def test_a_cell_is_as_white_as_the_whitest_pixel_in_it() -> None:
    soft = torch.linspace(0, 1, 64).expand(1, 1, 64, 64)
    assert torch.equal(latent_mask(soft, 16, 16)[0, 0, 0], soft[0, 0, 0, 3::4])
    assert latent_mask(soft[..., :2, 31:33], 4, 8)[0, 0, 0, 2:-1].diff().gt(0).all()  # interpolated
    assert latent_mask(torch.ones(2, 1, 64, 64), 2, 2).all() and not latent_mask(torch.zeros(2, 1, 64, 64), 2, 2).any()
