"""Token sampling: the original's recorded runs, seeds, modes and masks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from helpers.golden_data import Golden, assert_near
from helpers.recorded_noise import RecordedTokenNoise
from torch import Tensor

from wuerstchen_core.diffusion.samplers import guided
from wuerstchen_core.diffusion.token_sampler import SeededTokenNoise, choose, renoise, sample_tokens
from wuerstchen_core.models.token_decoder import TokenDecoder, TokenDecoderParams

RUNS = ("argmax", "multinomial", "quant_from_step2", "argmax_xinit")


@pytest.fixture(scope="module")
def golden() -> Golden:
    return Golden("paella_sample")


@pytest.fixture(scope="module")
def codebook() -> Tensor:
    return Golden("vqmodel_small")["weights/vquantizer.codebook.weight"]


@pytest.fixture(scope="module")
def model(golden: Golden) -> Callable[[Tensor, Tensor, float], Tensor]:
    weights = Golden("paella_small")
    network = TokenDecoder(TokenDecoderParams(**weights.sizes())).eval().requires_grad_(False)
    network.load_state_dict(weights.under("weights/"))
    features, text = golden["in/effnet"], golden["in/byt5"]
    return guided(network, (features, text), (torch.zeros_like(features), golden["in/byt5_uncond"]))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("run", RUNS)
def test_the_original_runs(golden: Golden, codebook: Tensor, model: Callable[..., Tensor], run: str) -> None:
    config = golden.config[run]
    steps, noise = config["steps"], golden[f"{run}/init_noise"]
    start = golden[config["init_x"]] if "init_x" in config else noise
    times = torch.linspace(config.get("t_start", 1.0), 0, steps + 1)
    assert_near(model(start, times[:1].expand(2), 2.0), golden[f"{run}/first_step_logits_guided"], 2e-4)
    seen: list[Tensor] = []
    exponentials = golden[f"{run}/exponential"] if run == "multinomial" else None
    out = sample_tokens(
        model,
        start,
        times,
        noise=noise,
        draw=RecordedTokenNoise(golden[f"{run}/renoise_uniform"], exponentials),
        codebook=codebook,
        scales=torch.linspace(*config["cfg"], steps).tolist(),
        temperatures=torch.linspace(*config["temperature"], steps).tolist(),
        mode=config["mode"],
        quantised_from=config.get("sampling_quant_steps"),
        renoise_steps=config.get("renoise_steps"),
        callback=lambda step, steps, x, denoised: seen.extend([x, denoised]),
    )
    assert torch.equal(out, golden[f"{run}/sampled"])
    recorded = list(golden[f"{run}/intermediate"])  # alternately chosen, and noised again until that ends
    renoised = len(recorded) - steps
    before, chosen = seen[0::2], seen[1::2]
    assert torch.equal(before[0], start)
    for i in range(steps):
        at = 2 * i if i <= renoised else renoised + i
        assert torch.equal(chosen[i], recorded[at]), i
        if i < renoised:
            assert torch.equal(before[i + 1], recorded[at + 1]), i


def test_renoising_as_in_training(golden: Golden) -> None:
    paella = Golden("paella_small")
    noised, replaced = renoise(
        paella["in/x"], paella["in/noise_random_x"], paella["in/noise_t"], paella["in/noise_uniform"]
    )
    assert torch.equal(noised, paella["out/noised"])
    assert torch.equal(replaced.long(), paella["out/noise_mask"])


def sample_columns(mode: str = "multinomial", seed: int = 5, pictures: int = 2, **more: Any) -> Tensor:
    """Samples 4 steps with a model that prefers token = column."""
    draw = SeededTokenNoise(seed, pictures)
    noise = draw.tokens(16, 8, 12)
    preferred = torch.nn.functional.one_hot(torch.arange(12), 16).T[None, :, None, :] * 4.0

    def model(tokens: Tensor, t: Tensor, scale: float) -> Tensor:
        own = torch.nn.functional.one_hot(tokens, 16).movedim(-1, 1) * (1 - t)[:, None, None, None] * 3
        return scale * preferred + own

    times, line = torch.linspace(1, 0, 5), [1.0] * 4
    codebook = torch.linspace(-1, 1, 16)[:, None].expand(16, 4)
    run = partial(sample_tokens, model, noise, times, noise=noise, draw=draw, codebook=codebook)
    return run(**{"scales": line, "temperatures": line, "mode": mode, **more})


@pytest.mark.parametrize("mode", ["multinomial", "argmax", "quantised"])
def test_a_batch_equals_its_singles(mode: str) -> None:
    both = sample_columns(mode)
    assert both.shape == (2, 8, 12)
    for i in range(2):
        assert torch.equal(sample_columns(mode, seed=5 + i, pictures=1)[0], both[i])


def test_seeds_and_modes_differ() -> None:
    assert not torch.equal(sample_columns(seed=5), sample_columns(seed=9))
    assert not torch.equal(sample_columns(), sample_columns("argmax"))
    assert torch.equal(sample_columns("argmax"), torch.arange(12).expand(2, 8, 12))


def test_the_mask_keeps_the_rest() -> None:
    init = torch.full((2, 8, 12), 15)
    mask = torch.zeros(2, 8, 12, dtype=torch.bool)
    mask[:, :, 6:] = True
    out = sample_columns("argmax", init=init, mask=mask)
    assert (out[:, :, :6] == 15).all()
    assert torch.equal(out[:, :, 6:], torch.arange(6, 12).expand(2, 8, 6))
    assert torch.equal(sample_columns("argmax", init=init, mask=mask.float()), out)
    with pytest.raises(ValueError, match="init and mask"):
        sample_columns(init=init)


def test_a_masks_value_is_the_time_until_which_a_token_is_kept() -> None:
    """The steps are at times 1, 0.75, 0.5 and 0.25."""
    seen: list[Tensor] = []
    mask = torch.tensor([0.2, 0.25, 0.6, 1.0]).repeat_interleave(3).expand(2, 8, 12)
    init = torch.full((2, 8, 12), 15)
    callback = lambda step, steps, tokens, chosen: seen.append((chosen[0, 0, ::3] == 15).tolist())  # noqa: E731
    sample_columns("argmax", init=init, mask=mask, callback=callback)
    assert seen == [[True, True, True, False]] * 2 + [[True, True, False, False], [True, False, False, False]]


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    draw = SeededTokenNoise(0, 1)
    probabilities = torch.tensor([0.5, 0.0, 0.3, 0.2])[None, :, None, None].expand(1, 4, 100, 200)
    fractions = draw.pick(probabilities).flatten().bincount(minlength=4) / 20_000
    assert_near(fractions, torch.tensor([0.5, 0.0, 0.3, 0.2]), 0.015)  # four standard deviations
    assert fractions[1] == 0


def test_temperature_sharpens() -> None:
    logits = torch.tensor([1.0, 0.0])[None, :, None, None].expand(1, 2, 100, 100)
    cold, warm = (
        choose(logits, "multinomial", temperature, torch.zeros(2, 4), SeededTokenNoise(0, 1)).float().mean()
        for temperature in (0.2, 1.0)
    )
    assert cold < 0.02 and warm == pytest.approx(0.269, abs=0.02)


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="'quant'.*multinomial, argmax, quantised"):
        sample_columns("quant")


@pytest.mark.parametrize("mode", ["multinomial", "argmax", "quantised"])
@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_refused(mode: str, scale: float) -> None:
    for step in range(4):
        scales = [1.0] * 4
        scales[step] = scale
        with pytest.raises(ValueError, match="Stage B"):
            sample_columns(mode, scales=scales)
