"""ComfyUI's sampling nodes with our models, schedules and samplers, compared with the core."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bundles import TINY, Generate
from errors import check_error
from inside_samplers import CFG, COUNTS, HALF, LONG, MANY, SEED, SPLIT_SEED, STAGES, STEPS, conditions, ends
from torch import Tensor

from tools.comfyui.client import Inside, Install, run_inside
from wuerstchen_core.checkpoints import build_part, read_part
from wuerstchen_core.diffusion.samplers import guided, sample, seeded_noise
from wuerstchen_core.diffusion.schedule import SCHEDULES, decoder_times, diffuse, linear_times, named_times
from wuerstchen_core.models.prior import features_from_latents, latents_from_features
from wuerstchen_core.models.vqgan import VQGANParams

pytestmark = pytest.mark.newest

OUTWARD: dict[str, Callable[[Tensor], Tensor]] = {
    "prior": features_from_latents,
    "decoder": lambda x: x * VQGANParams.scale_factor,
}
INWARD: dict[str, Callable[[Tensor], Tensor]] = {
    "prior": latents_from_features,
    "decoder": lambda x: x / VQGANParams.scale_factor,
}


@pytest.fixture(scope="module")
def inside(install: Install, checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> Inside:
    """The results of inside_samplers.py in this ComfyUI."""
    return run_inside(install, "inside_samplers.py", tmp_path_factory.mktemp("samplers"), checkpoints / TINY)


class Core:
    """The core's sampling of one stage, with the inputs of inside_samplers.py."""

    def __init__(self, checkpoints: Path, stage: str):
        parts = {name: read_part(checkpoints / TINY, name) for name in STAGES}
        widths = {"prior": parts["prior"].params.c_cond, "decoder": parts["decoder"].params.clip_embd}
        self.stage, self.network = stage, build_part(parts[stage])
        self.conds = [
            (options["stable_cascade_prior"], text) if stage == "decoder" else (text,)
            for [[text, options]] in conditions(stage, widths)
        ]

    @torch.inference_mode()
    def sample(
        self, x: Tensor, times: Tensor, seed: int, scale: float | None = None, sampler: str = "ddpm"
    ) -> tuple[Tensor, Tensor]:
        """Returns the last x along the times, and the last denoised x; the steps' noise uses `seed` + 1."""
        denoised: list[Tensor] = []
        x = sample(
            guided(self.network, *self.conds, CFG[self.stage] if scale is None else scale),
            x,
            times,
            draw=seeded_noise(seed + 1, len(x)),
            sampler=sampler,
            callback=lambda step, steps, x, clean: denoised.append(clean),
        )
        return x, denoised[-1]


def assert_close(comfyui: Tensor, core: Tensor, tolerance: float = 2e-4) -> None:
    """Asserts equality up to rounding, in standard deviations."""
    assert core.std() > 0
    assert (comfyui - core).abs().max() / core.std() < tolerance


@pytest.mark.parametrize("stage", STAGES)
def test_our_schedule_and_sampler_give_the_cores_result(inside: Inside, checkpoints: Path, stage: str) -> None:
    core, out = Core(checkpoints, stage), OUTWARD[stage]
    found = {name.removeprefix(f"{stage}/"): x for name, x in inside[0].items()}
    expected, clean = core.sample(found["noise"], linear_times(STEPS), SEED)
    assert (expected - clean).abs().max() > 1e-3  # the original's last step stops short of the clean picture
    for name in ("custom", "basic schedule", "advanced"):
        assert_close(found[name], out(expected))
    assert_close(found["unguided"], out(core.sample(found["noise"], linear_times(STEPS), SEED, 1.0)[0]))
    single = linear_times(1) if stage == "prior" else decoder_times(1)
    noisy = found["noise"] if stage == "prior" else diffuse(0 * found["noise"], single[:1], found["noise"])
    assert_close(found["one step"], out(core.sample(noisy, single, SEED)[0]))
    few = named_times("fast", 6) if stage == "prior" else linear_times(SCHEDULES["fast"].decoder_steps or 0)
    assert_close(found["fast"], out(core.sample(found["noise"], few, SEED, sampler="ddim")[0]))
    multistep, _ = core.sample(found["noise"], linear_times(STEPS), SEED, sampler="dpmpp_2m")
    for name in ("multistep", "multistep again"):
        assert_close(found[name], out(multistep))
    # ComfyUI's ddpm takes the same steps, and returns the denoised latents at the end.
    assert_close(found["ddpm"], out(clean))
    assert found["selected ddpm"].isfinite().all()


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_in_two_halves_is_one_run(inside: Inside, checkpoints: Path, stage: str) -> None:
    core, tensors, times = Core(checkpoints, stage), inside[0], linear_times(STEPS)
    left, _ = core.sample(tensors[f"{stage}/noise"], times[: HALF + 1], SEED)
    expected, _ = core.sample(left, times[HALF:], SPLIT_SEED)
    assert_close(tensors[f"{stage}/split"], OUTWARD[stage](expected))
    assert_close(tensors[f"{stage}/halves"], tensors[f"{stage}/whole"])


@pytest.mark.parametrize("stage", STAGES)
def test_the_network_gets_the_exact_times(inside: Inside, stage: str) -> None:
    for found, expected in (("long times", ends(linear_times(MANY))), (f"{stage}/times", linear_times(20))):
        times = inside[0][found]
        assert times[0] == 1
        torch.testing.assert_close(times, expected[:-1], rtol=0, atol=3e-7)


@pytest.mark.parametrize("stage", STAGES)
def test_denoise_below_1_starts_from_the_noised_latents(inside: Inside, stage: str) -> None:
    found = {name.removeprefix(f"{stage}/"): x for name, x in inside[0].items()}
    torch.testing.assert_close(found["denoise times"], linear_times(5, 0.5)[:-1], rtol=0, atol=3e-7)
    expected = diffuse(INWARD[stage](found["latent"]), torch.full((2,), 0.5), found["noise"])
    torch.testing.assert_close(found["denoise input"], expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize("stage", STAGES)
def test_repeated_sigmas_and_large_seeds_stay_finite(inside: Inside, stage: str) -> None:
    for name in ("repeated sigmas", "large seed"):
        assert inside[0][f"{stage}/{name}"].isfinite().all(), name


def test_schedules_start_at_the_largest_sigma_and_always_fall(inside: Inside) -> None:
    tensors, facts = inside
    for steps in COUNTS:
        error = (tensors[f"simple/{steps}"] - linear_times(steps)[:-1]).abs().max()
        assert error < (3e-7 if 277_200 % steps == 0 else 5e-6), steps
    for name, found in facts["schedules"].items():
        if name == "kl_optimal 1":  # ComfyUI divides by zero
            assert math.isnan(found["first"])
            continue
        assert found["falls"], name
        if not name.startswith("ddim_uniform"):  # starts a step lower with every model
            assert abs(found["first"] - 1) < 1e-5 and found["time"] == 1, name


def test_many_steps_stay_finite(inside: Inside) -> None:
    """Multistep samplers divide by differences of sigma, which are 0 where a schedule is clamped."""
    found = {name: x for name, x in inside[0].items() if " steps/" in name}
    assert len(found) == len(LONG) + 1
    for name, x in found.items():
        assert x.isfinite().all(), name


def test_stage_b_warns_about_each_sampler_that_adds_no_noise(inside: Inside) -> None:
    for name, found in inside[1]["samplers"].items():
        assert found["finite"] and found["warned"] == (not found["random"]), name


def test_each_warning_is_logged_at_each_run(inside: Inside) -> None:
    ddpm, ours, first, second, clone, another, prior, broken, early = inside[1]["warnings"]
    assert [ddpm, ours, prior] == [[]] * 3
    assert first == second == clone == another
    for lines, facts in ((first, ("Stage B", "ddpm")), (broken, ("finite",)), (early, ("Stage C", "linear_quadratic"))):
        [line] = lines
        assert "\n" not in line and all(fact in line for fact in facts)


def test_comfyuis_tables_are_unchanged(inside: Inside) -> None:
    assert inside[1]["tables kept"]


def test_our_sampler_rejects_another_noise_schedule(inside: Inside) -> None:
    check_error(inside[1]["other schedule"], "ModelSamplingAdvanced")


def test_ksamplers_run_both_stages(graph: dict[str, Any], generate: Generate) -> None:
    """KSampler replaces our node of Stage C, and KSamplerAdvanced, in two halves, that of Stage B."""
    [prior] = [node for node in graph.values() if node["class_type"] == "WuerstchenPriorSample"]
    [(key, decoder)] = [item for item in graph.items() if item[1]["class_type"] == "WuerstchenDecoderSample"]
    stage_c, stage_b = prior["inputs"], decoder["inputs"]
    common = {"steps": 4, "sampler_name": "ddpm", "scheduler": "simple"}
    own = {"cfg": 3.0, "seed": 5, "denoise": 1.0, "latent_image": stage_c["stage_c"]}
    prior["class_type"] = "KSampler"
    prior["inputs"] = {name: stage_c[name] for name in ("model", "positive", "negative")} | common | own
    own = {"cfg": 1.0, "noise_seed": 5, "model": stage_b["model"], "positive": stage_b["positive"]}
    own |= common | {"negative": stage_b["positive"]}
    early = {"add_noise": "enable", "start_at_step": 0, "end_at_step": 2, "return_with_leftover_noise": "enable"}
    late = {"add_noise": "disable", "start_at_step": 2, "end_at_step": 9, "return_with_leftover_noise": "disable"}
    graph["early"] = {"class_type": "KSamplerAdvanced", "inputs": {**own, **early, "latent_image": stage_b["stage_b"]}}
    graph[key] = {"class_type": "KSamplerAdvanced", "inputs": {**own, **late, "latent_image": ["early", 0]}}
    outcome = generate(graph)
    assert len(outcome.pictures) == 1 and not re.search("Stage B.*sampler", outcome.log)
