"""Reuse of a U-Net's deep levels: which calls reuse, and what they compute."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from helpers.networks import NETWORKS
from torch import Tensor

from wuerstchen_core.models.feature_reuse import DeepFeatures, FeatureReuse, full_steps

TIMES = [1.0, 0.8, 0.6, 0.4, 0.2, 0.0]  # of 5 steps; with an interval of 2, those at 1.0, 0.6 and 0.2 are full


def reused(reuse: FeatureReuse, time: float, key: str = "a") -> bool:
    """Calls the network at a time; returns True if it reuses features."""
    deep = reuse.call(time, key)
    found = deep.features is not None
    deep.features = torch.zeros(1)
    return found


@pytest.mark.parametrize(("steps", "interval"), [*product((1, 2, 3, 4, 12, 20, 1000), (1, 2, 3, 5, 100))])
def test_full_steps_are_evenly_spread_with_both_ends(steps: int, interval: int) -> None:
    full = full_steps(steps, interval)
    assert full[0] == 0 and full[-1] == steps - 1 and len(full) == min(steps, max(-(-steps // interval), 3))
    gaps = [b - a for a, b in zip(full, full[1:], strict=False)]
    assert not gaps or (min(gaps) >= 1 and max(gaps) - min(gaps) <= 1)


def test_the_published_steps() -> None:
    assert full_steps(12, 2) == [0, 3, 5, 7, 9, 11] and full_steps(12, 3) == [0, 4, 8, 11]


def test_steps_between_reuse() -> None:
    reuse = FeatureReuse(2, TIMES)
    assert [reused(reuse, time) for time in TIMES[:-1]] == [False, True, False, True, False]
    assert reuse.reused == 2


def test_another_key_has_its_own_features() -> None:
    reuse = FeatureReuse(2, TIMES)
    assert not reused(reuse, 1.0) and not reused(reuse, 0.8, "b")  # the prompt changes in a step between
    assert reused(reuse, 0.8) and not reused(reuse, 0.6, "b") and not reused(reuse, 0.6)
    assert reused(reuse, 0.4) and reused(reuse, 0.4, "b")


def test_features_older_than_the_last_full_step_are_not_reused() -> None:
    reuse = FeatureReuse(2, TIMES)
    assert not reused(reuse, 1.0)
    assert not reused(reuse, 0.4)  # the call at 0.6 did not come, as with EasyCache
    assert not reused(reuse, 0.2) and not reused(reuse, 0.8)  # back in time, as restarting samplers go


@pytest.mark.parametrize("between", [(0.9, 0.7, 0.5, 0.3, 0.1), (0.8, 0.6, 0.4, 0.2, 0.0)], ids=["dpmpp_2s", "heun"])
def test_second_order_samplers_reuse_by_time(between: tuple[float, ...]) -> None:
    """Both of a step's calls are full or reuse, as the step that their time falls in."""
    reuse = FeatureReuse(2, TIMES)
    for i, second in enumerate(between):
        assert reused(reuse, TIMES[i]) == (i in (1, 3))
        if second:
            step = i if second != TIMES[i + 1] else i + 1
            assert reused(reuse, second) == (step in (1, 3))


def test_a_key_of_several_inputs_never_reuses() -> None:
    reuse = FeatureReuse(2, TIMES)
    assert not any(reused(reuse, time, "tile") for time in TIMES[:-1] for _ in range(3))


def test_a_failed_call_leaves_no_features() -> None:
    reuse = FeatureReuse(2, TIMES)
    assert reuse.call(1.0, "a").features is None  # the network raises an error
    assert reuse.call(0.8, "a").features is None


@pytest.mark.parametrize("name", ["decoder", "token_decoder"])
@torch.inference_mode()
def test_the_deep_levels_are_left_out(name: str) -> None:
    network, inputs = NETWORKS[name].perturbed(), NETWORKS[name].inputs()
    ran: list[int] = []
    for level, layers in enumerate((*network.down_blocks, *network.up_blocks)):  # type: ignore[misc]
        layers[-1].register_forward_hook(lambda *_, level=level: ran.append(level))
    expected: Tensor = network(*inputs)
    deep = DeepFeatures(0)
    assert torch.equal(network(*inputs, deep=deep), expected) and deep.features is not None
    ran.clear()
    assert torch.equal(network(*inputs, deep=deep), expected) and ran == [0, 5]
    x = inputs[0].roll(1, -1)
    near, full = network(x, *inputs[1:], deep=deep), network(x, *inputs[1:])
    assert not torch.equal(near, expected) and not torch.equal(near, full)
    deep.features = torch.zeros_like(deep.features)
    assert not torch.equal(network(*inputs, deep=deep), expected)
