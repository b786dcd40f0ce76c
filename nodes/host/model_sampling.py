"""Würstchen's noise schedule as ComfyUI's `model_sampling`: sigma^2 = (1 - alpha_bar) / alpha_bar."""

from __future__ import annotations

import math

import comfy.model_sampling
import torch
from torch import Tensor

from ...wuerstchen_core.diffusion.schedule import ALPHA_BAR_MAX, ALPHA_BAR_MIN, S
from .network_patches import NamesMissing

# Divisible by 1 to 12, 15, 16, 20, 25, 30, 50 and 60: with these step counts, ComfyUI's `simple` schedule is exact.
TABLE = 277_200

_HALF_TURN = math.pi / 2 / (1 + S)  # angle per unit of time
_COS2, _SIN2 = math.cos(S * _HALF_TURN) ** 2, math.sin(S * _HALF_TURN) ** 2  # at t = 0
SIGMA_MIN = math.sqrt((1 - ALPHA_BAR_MAX) / ALPHA_BAR_MAX)
SIGMA_MAX = math.sqrt((1 - ALPHA_BAR_MIN) / ALPHA_BAR_MIN)

# Where the schedule is clamped (the last 0.6 % of time and the first 0.2 %) sigma would be constant. Here it rises by
# this fraction of itself per unit of time, 0.16 % in all: multistep samplers divide by differences of sigma, and the
# network gets the intended time.
_SLOPE = 0.25
_ROUNDING = 2e-5  # of ComfyUI's schedulers, which compute the first sigma from the largest


class WuerstchenSampling(NamesMissing, comfy.model_sampling.StableCascadeSampling, comfy.model_sampling.EPS):
    """Würstchen's cosine schedule; tangents instead of cosines keep fp32 precision at both ends."""

    multiplier = 1.0  # some nodes pass it back to set_parameters
    noise_scale = 1.0

    def set_parameters(self, shift: float = 1.0, cosine_s: float = S, multiplier: float = 1.0) -> None:
        if (shift, cosine_s, multiplier) != (1.0, S, 1.0):
            raise ValueError(
                f"Würstchen's schedule has shift 1, offset {S}, multiplier 1: {shift}, {cosine_s}, {multiplier}"
            )
        self.shift = shift
        self.num_timesteps = TABLE
        self.set_sigmas(self.sigma(torch.arange(1, TABLE + 1, dtype=torch.float64) / TABLE).float())

    def set_noise_scale(self, noise_scale: float) -> None:
        """Multiplies the initial noise."""
        self.noise_scale = noise_scale

    def noise_scaling(self, sigma: Tensor, noise: Tensor, latent_image: Tensor, max_denoise: bool = False) -> Tensor:
        return super().noise_scaling(sigma, noise * self.noise_scale, latent_image, max_denoise)

    def sigma(self, timestep: Tensor | float) -> Tensor:
        """Returns the sigma of times in [0, 1]: the schedule's, strictly rising, and exact at both ends."""
        t = torch.as_tensor(timestep).clamp(0, 1)  # SDTurboScheduler passes whole numbers up to 999
        cosine = (_COS2 * torch.tan((t + S) * _HALF_TURN) ** 2 - _SIN2).clamp(min=0.0).sqrt()
        return cosine.clamp(SIGMA_MIN + SIGMA_MIN * _SLOPE * t, SIGMA_MAX - SIGMA_MAX * _SLOPE * (1 - t))

    def timestep(self, sigma: Tensor) -> Tensor:
        """Returns the time in [0, 1] of sigmas; exactly 1 for the largest."""
        cosine = torch.atan(((sigma**2 + _SIN2) / _COS2).sqrt()) / _HALF_TURN - S
        low, high = (sigma - SIGMA_MIN) / (SIGMA_MIN * _SLOPE), 1 - (SIGMA_MAX - sigma) / (SIGMA_MAX * _SLOPE)
        t = torch.minimum(torch.maximum(cosine, high), low).clamp(0.0, 1.0)
        return torch.where(sigma >= SIGMA_MAX * (1 - _ROUNDING), torch.ones_like(t), t)
