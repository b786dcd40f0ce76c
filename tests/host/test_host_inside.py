"""ComfyUI's objects equal the core: text encoders, noise schedule, and networks in three ways of loading."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bundles import TINY
from inside import AREA, PROMPTS, calls
from torch import Tensor

from tools.comfyui.client import Inside, Install, run_inside
from wuerstchen_core.checkpoints import build_part, demo_path, load_text_encoder, read_part
from wuerstchen_core.diffusion.schedule import alpha_bar
from wuerstchen_core.models.decoder import resize_prior_latents
from wuerstchen_core.models.text_encoder import tokenize

STAGES = ("prior", "decoder")


@pytest.fixture(scope="module")
def inside(install: Install, checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> Inside:
    """The results of inside.py in this ComfyUI."""
    return run_inside(install, "inside.py", tmp_path_factory.mktemp("inside"), checkpoints / TINY)


@pytest.fixture(scope="module")
def expected(checkpoints: Path) -> dict[str, Tensor]:
    """The core's predictions for the same inputs."""
    parts = {stage: read_part(checkpoints / TINY, stage) for stage in STAGES}
    inputs = calls(parts["prior"].params.c_cond, parts["decoder"].params.clip_embd)
    x, t, text, prior_latents = inputs["decoder"]
    with torch.inference_mode():
        return {
            "prior": build_part(parts["prior"])(*inputs["prior"]),
            "decoder": build_part(parts["decoder"])(x, t, prior_latents, text),
        }


@pytest.mark.parametrize("stage", STAGES)
def test_text_states_equal_the_cores(inside: Inside, checkpoints: Path, stage: Any) -> None:
    encoder = load_text_encoder(checkpoints / TINY, which=stage)
    with torch.inference_mode():
        states = encoder(*tokenize(PROMPTS))
    for i in range(len(PROMPTS)):
        torch.testing.assert_close(inside[0][f"text/{stage}/{i}"][0], states[i], rtol=0, atol=1e-5)
    assert (states[0] - states[1]).abs().max() > 0.1


def test_time_and_sigma_are_inverse_and_exact_at_the_start(inside: Inside) -> None:
    tensors, _ = inside
    times, sigmas, again = tensors["times"], tensors["sigmas"], tensors["times_again"]
    signal = alpha_bar(times.double())
    expected = ((1 - signal) / signal).sqrt()
    inner = (times > 0.0023) & (times < 0.9935)  # outside, the schedule is clamped
    torch.testing.assert_close(sigmas[inner].double(), expected[inner], rtol=1e-5, atol=0)
    torch.testing.assert_close(sigmas.double(), expected, rtol=1.7e-3, atol=0)
    torch.testing.assert_close(sigmas[[0, -1]].double(), expected[[0, -1]], rtol=1e-7, atol=0)
    torch.testing.assert_close(again, times, rtol=0, atol=3e-7)
    assert again[-1] == 1 and (sigmas.diff() > 0).all()
    assert tensors["table"][-1] == sigmas.max() and (tensors["table"].diff() > 0).all()


@pytest.mark.parametrize("stage", STAGES)
def test_networks_equal_the_cores(inside: Inside, expected: dict[str, Tensor], stage: str) -> None:
    tensors, facts = inside
    torch.testing.assert_close(tensors[f"network/{stage}"], expected[stage], rtol=1e-5, atol=1e-5)
    assert not facts[f"{stage} training"]
    assert facts[f"{stage} comfy layers"] > 10


@pytest.mark.parametrize("stage", STAGES)
def test_a_partial_load_computes_on_the_device(inside: Inside, expected: dict[str, Tensor], stage: str) -> None:
    _, facts = inside
    assert facts[f"{stage} offloaded"] > 0
    assert facts[f"{stage} partial"] == list(expected[stage].shape)


@pytest.mark.parametrize("stage", STAGES)
def test_offloaded_weights_are_copied_by_streams_and_released(inside: Inside, stage: str) -> None:
    """A stream copies the next layer's weights while the device computes with the last ones."""
    casts = inside[1][f"{stage} casts"]
    if not casts:
        pytest.skip("this ComfyUI's streams are not released")
    assert casts["at once"] == 0 and casts["by a stream"] == casts["released"] > 10


@pytest.mark.parametrize("stage", STAGES)
def test_comfyui_casts_weights_in_half_precision(inside: Inside, expected: dict[str, Tensor], stage: str) -> None:
    tensors, facts = inside
    assert facts[f"{stage} half"] == ["torch.bfloat16", "torch.float32"]
    error = (tensors[f"half/{stage}"] - expected[stage]).std() / expected[stage].std()
    assert 0 < error < 0.02


def test_a_bundles_name_can_come_from_another_node(inside: Inside) -> None:
    """ComfyUI calls it with None before it has the name; an error would load the model again in every run."""
    assert inside[1]["fingerprint of None"] is None


def test_an_area_uses_the_same_area_of_stage_c(inside: Inside) -> None:
    x, _, _, prior_latents = calls(1, 1)["decoder"]
    height, width, top, left = AREA
    whole = resize_prior_latents(prior_latents, x.shape[-2:])
    assert torch.equal(inside[0]["whole prior"], prior_latents)
    assert torch.equal(inside[0]["cropped prior"], whole[..., top : top + height, left : left + width])


@pytest.mark.parametrize("stage", STAGES)
def test_previews_project_the_samplers_latents(inside: Inside, stage: str) -> None:
    tensors, facts = inside
    x = calls(1, 1)[stage][0]
    expected = (x[0, :3].movedim(0, -1) * 0.1 + torch.tensor([0.0, 0.0, 0.5]) + 1) / 2 * 255
    torch.testing.assert_close(tensors[f"preview/{stage}"].float(), expected.clamp(0, 255), rtol=0, atol=1.01)
    assert not tensors[f"no preview/{stage}"].numel()  # without the file
    file = demo_path().with_name("preview_factors.json")
    shipped = json.loads(file.read_text(encoding="utf-8"))[stage] if file.is_file() else {}
    assert facts[f"{stage} shipped factors"] == [shipped.get("factors"), shipped.get("bias")]


def test_every_input_is_checked_by_its_widgets_limits(inside: Inside) -> None:
    assert inside[1]["unchecked"] == []
