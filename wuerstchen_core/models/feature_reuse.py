"""Reuse of a U-Net's deep levels between sampling steps (DeepCache, arXiv 2312.00858)."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass
class DeepFeatures:
    """The output of the levels below the finest, for one call of a U-Net: reused if set, otherwise stored by the call.

    They change little from step to step, and take nine tenths of a step's time at v2's widths.
    """

    step: int
    features: Tensor | None = None


def full_steps(steps: int, interval: int) -> list[int]:
    """Returns the steps that compute all levels: one in `interval` and at least three, with the first and the last.

    They are evenly spread. The last step matters most: with it, 12 steps of which 6 are full are 52 dB instead of 50 dB
    from 12 full ones on the shipped model. 4 steps of which 3 are full are 52 dB from 4 full ones, and with 2 46 dB.
    """
    count = min(steps, max(-(-steps // interval), 3))
    return [-(-i * (steps - 1) // max(count - 1, 1)) for i in range(count)]


class FeatureReuse:
    """Keeps the deep features of one sampling, by what identifies a call: its conditioning and shape.

    `times` [N + 1] are those of the steps, or their sigmas, from first to last. A call belongs to the step that its
    time falls in, so that samplers may call the network more than once per step. A call reuses features only if an
    equal key stored them at the last full step or after it.
    """

    def __init__(self, interval: int, times: Sequence[float]):
        self.reused = 0  # calls
        self._ends = [-time for time in times[1:]]
        self._full = full_steps(len(times) - 1, interval)
        self._kept: dict[Hashable, DeepFeatures] = {}
        self._first: dict[Hashable, float] = {}  # the time of a key's first call
        self._ambiguous: set[Hashable] = set()

    def call(self, time: float, key: Hashable) -> DeepFeatures:
        """Returns the features of a call of the network at `time`, for `UNet.run`.

        A key that is called again at the time of its first call stands for several inputs, such as an image's tiles:
        it never reuses features.
        """
        if key not in self._first:
            self._first[key] = time
        elif self._first[key] == time:
            self._ambiguous.add(key)
        step = min(bisect_right(self._ends, -time), len(self._ends) - 1)
        last_full = self._full[bisect_right(self._full, step) - 1]
        kept = self._kept.get(key)
        if kept is not None and kept.features is not None and last_full <= kept.step <= step != last_full:
            if key not in self._ambiguous:
                self.reused += 1
                return kept
        self._kept[key] = DeepFeatures(step)
        return self._kept[key]

    def clear(self) -> None:
        """Releases all features."""
        self._kept.clear()
