"""The step study of the shipped model: its schedules, its stored results, and its page."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.golden_data import assert_near
from PIL import Image

from wuerstchen_core.checkpoints import read_metadata
from wuerstchen_core.diffusion.schedule import alpha_bar, linear_times

pytest.importorskip("resvg_py", reason="drawing needs resvg-py")
pytest.importorskip("tqdm", reason="measuring needs tqdm")

from tools import DOCS  # noqa: E402
from tools.demo import evaluate, reuse_trials, steps, steps_trials  # noqa: E402

RESULTS = steps_trials.stored_results()


def test_the_schedules_that_are_compared() -> None:
    even = alpha_bar(steps_trials.log_snr_times(8).double()).logit().diff()
    assert_near(even, torch.full_like(even, even.mean()), 2e-3)
    for times in steps_trials.SHAPES.values():
        for count in (1, 2, 7):
            assert len(times(count)) == count + 1 and (times(count).diff() < 0).all()
            assert times(count)[0] == 1 and times(count)[-1] == 0
            assert times(1).tolist() == linear_times(1).tolist()


def test_the_shipped_model_was_measured_and_needs_no_more_steps() -> None:
    """With the shipped weights, `fast` is no worse than 30 + 12 steps in either stage and as a whole.

    Its error of Stage C's features is a sixth larger, which the images do not show.
    """
    assert {steps.key(row) for row in RESULTS["rows"]} == set(steps_trials.trials())
    found = steps.by_trial(RESULTS)
    for trial, worse in (
        (("prior", "ddim", "squared", steps_trials.FAST.steps), {"error": 1.2}),
        (("decoder", "ddpm", "linear", steps_trials.FAST.decoder_steps), {}),
    ):
        reference = found[steps_trials.REFERENCE[trial[0]]]
        allowed = {name: factor * reference[name] for name, factor in worse.items()}
        assert steps.as_good(found[trial], {**reference, **allowed}, RESULTS["count"])
    original, fast = (RESULTS["whole"][name] for name in steps_trials.WHOLE)
    for name in ("thing", "background", "compressed"):
        assert fast[name]["interval"][0] <= original[name]["percent"] <= fast[name]["interval"][1], name
        assert fast[name]["count"] == original[name]["count"]
    assert fast["psnr"]["mean"] > original["psnr"]["mean"] - 0.1
    hard = [row["thing"] for row in RESULTS["hard"]]
    assert [steps.key(row) for row in RESULTS["hard"]] == steps_trials.HARD_TRIALS and hard[-1] >= hard[0]
    held = evaluate.held_out_scenes(read_metadata("demo"))
    assert original["thing"]["count"] == original["compressed"]["count"] >= len(held) // steps_trials.WHOLE_EVERY


def test_reuse_beats_fewer_steps() -> None:
    """Half of 12 steps reuse: less time than 8 full steps, all things that 12 full steps get right, and near them."""
    found = {(row["steps"], row["reuse"]): row for row in RESULTS["reuse"]["rows"]}
    assert [*found] == reuse_trials.TRIALS and RESULTS["reuse"]["count"] >= 100
    full, reused, fewer = found[12, 1], found[12, 2], found[8, 1]
    assert reused["thing"] == full["thing"] and reused["time"] < fewer["time"] and reused["psnr"][0] > 49.2
    assert reused["psnr"][1] > fewer["psnr"][0] + 9


def test_a_worse_trial_is_not_as_good() -> None:
    row = {"stage": "decoder", "thing": 30, "background": 30, "psnr": 28.0, "detail": 1.5}
    assert steps.as_good({**row, "thing": 29, "psnr": 27.95, "detail": 1.46}, row, 30)
    for worse in ({"thing": 23}, {"background": 23}, {"psnr": 27.8}, {"detail": 1.7}, {"detail": 1.3}):
        assert not steps.as_good({**row, **worse}, row, 30), worse
    row = {**row, "stage": "prior", "error": 0.02}
    assert steps.as_good(row, row, 30) and not steps.as_good({**row, "error": 0.021}, row, 30)


def test_the_page_matches_the_results(tmp_path: Path) -> None:
    assert (DOCS / "steps.md").read_text(encoding="utf-8") == steps.page(RESULTS)
    steps_trials.write_results(RESULTS, tmp_path / "again.json")
    assert steps_trials.stored_results(tmp_path / "again.json") == RESULTS
    assert (tmp_path / "again.json").read_bytes() == steps_trials.RESULTS.read_bytes()
    pytest.importorskip("matplotlib", reason="plotting needs matplotlib")
    steps.plot(RESULTS, tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as image:
        assert image.width == 900


def test_results_of_other_weights_are_said_to_be_that_and_measured_again(tmp_path: Path) -> None:
    for model, count in ((steps_trials.shipped_model(), len(RESULTS["rows"])), ("0" * 12, 0)):
        steps_trials.write_results({**RESULTS, "model": model}, tmp_path / "results.json")
        assert len(steps_trials.read_results(tmp_path / "results.json")["rows"]) == count
        assert ("earlier" in steps.page({**RESULTS, "model": model})) == (count == 0)
