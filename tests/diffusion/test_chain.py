"""The whole chain from text states to pictures against the original and diffusers, with recorded noise."""

from __future__ import annotations

import pytest
import torch
from helpers.golden_data import Golden, assert_near
from helpers.recorded_noise import recorder, replay
from torch import Tensor

from wuerstchen_core.diffusion.samplers import ddpm_step, guided, sample
from wuerstchen_core.diffusion.schedule import diffuse, linear_times, named_times
from wuerstchen_core.models.decoder import Decoder, DecoderParams
from wuerstchen_core.models.prior import Prior, PriorParams
from wuerstchen_core.models.vqgan import VQGAN, VQGANParams

pytestmark = pytest.mark.usefixtures("kernels")
SCALE = 0.3764


@pytest.fixture(scope="module")
def prior() -> Prior:
    golden = Golden("prior_small")
    network = Prior(PriorParams(**golden.sizes())).eval().requires_grad_(False)
    network.load_state_dict(golden.weights())
    return network


@pytest.fixture(scope="module")
def vqgan() -> VQGAN:
    golden = Golden("vqmodel_small")
    network = VQGAN(VQGANParams(**golden.sizes())).eval().requires_grad_(False)
    network.load_state_dict(golden.weights())
    return network


def test_the_original(prior: Prior, vqgan: VQGAN) -> None:
    golden, weights = Golden("e2e_v2_small"), Golden("diffnext_small")
    decoder = Decoder(DecoderParams(**weights.sizes())).eval().requires_grad_(False)
    decoder.load_state_dict(weights.weights())

    seen: list[Tensor] = []
    latents = sample(
        guided(prior, (golden["in/c_prior"],), (golden["in/c_prior_uncond"],), 4.0),
        golden["in/prior_x_T"],
        named_times("original", 30),
        draw=replay(*golden["in/prior_phase0_noise"], *golden["in/prior_phase1_noise"]),
        callback=recorder(seen),
    )
    steps = torch.cat([golden["out/prior_phase0_preds"], golden["out/prior_phase1_preds"]])
    assert_near(torch.stack(seen), steps, 6e-5)  # observed 6e-6
    embeddings = latents * 42 - 1
    assert_near(embeddings, golden["out/image_embeddings"], 5e-4)  # observed 5e-5

    seen = []
    latents = sample(
        lambda x, t: decoder(x, t, embeddings, golden["in/clip_decoder"]),
        golden["in/decoder_x_T"],
        linear_times(12),
        draw=replay(*golden["in/decoder_noise"]),
        callback=recorder(seen),
    )
    assert_near(torch.stack(seen), golden["out/decoder_preds"], 2e-4)  # observed 2e-5
    assert_near(vqgan.decode(latents * SCALE), golden["out/image"], 1e-5)  # observed 1e-6


@pytest.fixture(scope="module")
def golden() -> Golden:
    return Golden("diffusers_v2_small")


@pytest.fixture(scope="module")
def diffusers_decoder(golden: Golden) -> Decoder:
    sizes = {key: value for key, value in golden.config["decoder"].items() if key != "dropout"}
    network = Decoder(DecoderParams(**sizes)).eval().requires_grad_(False)
    network.load_state_dict(golden.weights("weights_original_keys/"))
    return network


@pytest.mark.parametrize("step", [0, 5, 11])
def test_a_step_of_diffusers_scheduler(golden: Golden, step: int) -> None:
    times = golden["scheduler/timesteps_12"]
    assert_near(linear_times(12), times, 2e-7)
    t, t_next = times[step].expand(2), times[step + 1].expand(2)
    noise = replay(golden[f"scheduler/step/noise_{step}"])
    out = ddpm_step(golden["scheduler/step/sample"], golden["scheduler/step/model_output"], t, t_next, noise)
    assert_near(out, golden[f"scheduler/step/prev_sample_{step}"], 1e-5)  # of values up to 50


def test_diffusers_decoder(golden: Golden, diffusers_decoder: Decoder) -> None:
    out = diffusers_decoder(*(golden[f"decoder/in/{name}"] for name in ("x", "r", "effnet", "clip")))
    assert_near(out, golden["decoder/out/eps_original"], 2e-5)


@pytest.mark.parametrize(
    ("run", "times"), [("default_timesteps", named_times("diffusers", 29)), ("6steps", linear_times(6))]
)
def test_diffusers_prior_pipeline(golden: Golden, prior: Prior, run: str, times: Tensor) -> None:
    run = f"prior_{run}"
    assert_near(times, golden[f"{run}/timesteps"], 2e-7)
    seen: list[Tensor] = []
    latents = sample(
        guided(prior, (golden["pipeline/prompt_embeds"],), (golden["pipeline/negative_prompt_embeds"],), 4.0),
        golden[f"{run}/x_T"],
        times,
        draw=replay(*golden[f"{run}/noise"]),
        callback=recorder(seen),
    )
    assert_near(torch.stack(seen), golden[f"{run}/latents"], 2e-3)  # observed 2e-4
    assert_near(latents * 42 - 1, golden[f"{run}/image_embeddings"], 2e-3)


@pytest.mark.parametrize(("run", "steps", "scale"), [("12steps", 12, 1.0), ("3steps_cfg2", 3, 2.0)])
def test_diffusers_decoder_pipeline(
    golden: Golden, diffusers_decoder: Decoder, vqgan: VQGAN, run: str, steps: int, scale: float
) -> None:
    run = f"decoder_{run}"
    times = linear_times(steps)
    assert_near(times, golden[f"{run}/timesteps"], 2e-7)
    embeddings = golden["prior_default_timesteps/image_embeddings"]
    cond = embeddings, golden["pipeline/decoder_text"]
    uncond = torch.zeros_like(embeddings), golden["pipeline/negative_prompt_embeds"]
    seen: list[Tensor] = []
    latents = sample(
        guided(diffusers_decoder, cond, uncond, scale),
        golden[f"{run}/x_T"],
        times,
        draw=replay(*golden[f"{run}/noise"]),
        callback=recorder(seen),
    )
    expected = golden[f"{run}/latents"]
    # The first steps reach 200, so each step is measured in its own spread: 10 times the network's 2e-6.
    spread = expected.std(dim=(1, 2, 3, 4), keepdim=True).clamp(min=1)
    assert_near(torch.stack(seen) / spread, expected / spread, 2e-5)
    image = vqgan.decode(latents * SCALE).clamp(0, 1)
    assert_near(image, golden[f"{run}/image_clamped"], 1e-5)


def test_diffusers_noise_is_diffuse(golden: Golden) -> None:
    picture, noise = golden["scheduler/step/sample"], golden["scheduler/step/model_output"]
    assert_near(diffuse(picture, golden["scheduler/add_noise_t"], noise), golden["scheduler/add_noise"], 1e-6)
