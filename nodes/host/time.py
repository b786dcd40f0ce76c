"""Noise level to time and back, as the host's samplers ask for it: sigma^2 = (1 - alpha_bar) / alpha_bar."""

from __future__ import annotations

import math

import comfy.model_sampling
import torch
from torch import Tensor

from ...wuerstchen_core.diffusion.schedule import ALPHA_BAR_MAX, ALPHA_BAR_MIN, S

# Divisible by 1 to 12, 15, 16, 20, 25, 30, 50 and 60: with so many steps the host's `simple` schedule is exact.
TABLE = 277_200

_ANGLE = S / (1 + S) * math.pi / 2  # of t = 0
_COS2, _SIN2 = math.cos(_ANGLE) ** 2, math.sin(_ANGLE) ** 2
SIGMA_MIN = math.sqrt((1 - ALPHA_BAR_MAX) / ALPHA_BAR_MAX)
SIGMA_MAX = math.sqrt((1 - ALPHA_BAR_MIN) / ALPHA_BAR_MIN)


class WuerstchenSampling(comfy.model_sampling.StableCascadeSampling, comfy.model_sampling.EPS):
    """Würstchen's cosine schedule; tangents instead of cosines keep fp32's digits at both ends."""

    def set_parameters(self, shift: float = 1.0, cosine_s: float = S) -> None:
        if (shift, cosine_s) != (1.0, S):
            raise ValueError(f"Würstchen was trained without a shift: got shift {shift} and offset {cosine_s}")
        self.num_timesteps = TABLE
        self.set_sigmas(self.sigma(torch.arange(1, TABLE + 1, dtype=torch.float64) / TABLE).float())

    def sigma(self, timestep: Tensor | float) -> Tensor:
        """Noise level at times in [0, 1], clamped as the schedule clamps alpha_bar."""
        t = torch.as_tensor(timestep)
        tangent = torch.tan((t + S) / (1 + S) * (math.pi / 2))
        return (_COS2 * tangent**2 - _SIN2).clamp(SIGMA_MIN**2, SIGMA_MAX**2).sqrt()

    def timestep(self, sigma: Tensor) -> Tensor:
        """Time of noise levels; the largest is exactly 1, where the clamp hides the last 0.6 % of time."""
        t = torch.atan(((sigma**2 + _SIN2) / _COS2).sqrt()) / (math.pi / 2) * (1 + S) - S
        return torch.where(sigma >= SIGMA_MAX * (1 - 1e-4), torch.ones_like(t), t)
