"""Stage B that reuses its deep levels in ComfyUI: equal to the core, and full wherever that would be unsound."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bundles import TINY
from inside_reuse import KEPT, STEPS

from tools.comfyui.client import Inside, Install, run_inside

FULL = 3  # of the 5 steps with reuse 2


@pytest.fixture(scope="module")
def inside(install: Install, checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> Inside:
    """The results of inside_reuse.py in this ComfyUI."""
    return run_inside(install, "inside_reuse.py", tmp_path_factory.mktemp("reuse"), checkpoints / TINY)


@pytest.mark.parametrize("run", ["default", "off", "two", "guided", "masked", "apart"])
def test_the_same_seed_gives_the_cores_latents(inside: Inside, run: str) -> None:
    got, want = inside[0][f"got/{run}"], inside[0][f"want/{run}"]
    assert (got - want).abs().max() / want.std() < 2e-4


def test_off_is_the_default(inside: Inside) -> None:
    assert torch.equal(inside[0]["got/off"], inside[0]["got/default"])
    assert not torch.equal(inside[0]["got/two"], inside[0]["got/default"])


def test_the_kept_area_is_exact(inside: Inside) -> None:
    want, got = inside[0]["want/masked"], inside[0]["got/masked"]
    torch.testing.assert_close(got[..., :KEPT], want[..., :KEPT], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("run", "rows", "full"),
    [
        ("off", 2, STEPS), ("two", 2, FULL), ("guided", 4, FULL), ("apart", 4, FULL), ("masked", 2, FULL),
        ("areas", 4, FULL),
    ],
)  # fmt: skip
def test_only_full_steps_compute_the_deep_levels(inside: Inside, run: str, rows: int, full: int) -> None:
    facts = inside[1][run]
    assert (facts["finest"], facts["deepest"]) == (rows * STEPS, rows * full) and not facts["notices"]


def test_heun_calls_the_network_twice_a_step(inside: Inside) -> None:
    """The last of the five steps makes one call. Full are those at the sigmas of steps 0, 2 and 4: 1 + 2 + 2."""
    tensors, facts = inside
    assert facts["heun 1"]["finest"] == facts["heun 1"]["deepest"] == facts["heun 2"]["finest"] == 2 * 9
    assert facts["heun 2"]["deepest"] == 2 * 5 and tensors["heun/2"].isfinite().all()
    assert not torch.equal(tensors["heun/1"], tensors["heun/2"])


def test_a_prompt_that_changes_starts_with_a_full_step(inside: Inside) -> None:
    facts = inside[1]["prompt changes"]
    assert facts["finest"] == 2 * STEPS and 2 * FULL <= facts["deepest"] < facts["finest"] and not facts["notices"]


@pytest.mark.parametrize("run", ["patched", "tiles", "hooks", "mask by step"])
def test_where_it_is_unsound_all_steps_are_full(inside: Inside, run: str) -> None:
    facts = inside[1][run]
    assert facts["deepest"] == facts["finest"] > 0 and facts["same"]
    assert len(facts["notices"]) == 1


def test_features_are_freed(inside: Inside) -> None:
    assert inside[1]["freed"] == [True, True, True]
