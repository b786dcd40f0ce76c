"""Losses and training noise against golden data and their definitions."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.golden_data import Golden, assert_near

from wuerstchen_core.common.dataclass_config import from_table
from wuerstchen_core.diffusion.schedule import alpha_bar
from wuerstchen_core.models.layers import TimestepBlock, timestep_embedding
from wuerstchen_core.models.prior import PriorParams, features_from_latents, latents_from_features
from wuerstchen_core.training.rng import StepRandom
from wuerstchen_core.training.stages.losses import (
    DecoderNoiseConfig,
    NoiseConfig,
    TokenNoiseConfig,
    absolute_error,
    contrastive_loss,
    corrupt_features,
    draw_noise,
    draw_times,
    freeze_fast_times,
    noise_loss,
    noise_weight,
    squared_error,
    token_loss,
    token_weight,
)

TOLERANCE = 1e-5  # the golden tables were observed equal to 1e-6
DRAWS = 20_000


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_errors_are_means_with_weights() -> None:
    predicted, target = torch.tensor([1.0, -3.0]).view(1, 1, 1, 2), torch.zeros(1, 1, 1, 2)
    weights = torch.tensor([2.0, 0.5]).view(1, 1, 1, 2)
    assert (squared_error(predicted, target), absolute_error(predicted, target)) == (5, 2)
    assert squared_error(predicted, target, weights) == (2 * 1 + 0.5 * 9) / 2
    assert absolute_error(predicted, target, weights) == (2 * 1 + 0.5 * 3) / 2


def test_p2_equals_the_originals() -> None:
    golden = Golden("schedule_tables")
    assert_near(noise_weight(NoiseConfig(), golden["in/t"]), golden["out/p2_weight_scaler1"], TOLERANCE)


def test_token_weight_and_loss_equal_the_originals() -> None:
    golden = Golden("paella_small")
    replaced, t = golden["out/noise_mask"].bool(), golden["in/noise_t"]
    weight = token_weight(replaced, t)
    assert_near(weight, golden["out/loss_weight"], TOLERANCE)
    logits, tokens, config = golden["out/train_pred"], golden["in/x"], TokenNoiseConfig()
    assert_near(token_loss(config, logits, tokens, replaced, t), golden["out/train_loss"], TOLERANCE)
    entropy, weight = golden["out/train_ce"], golden["out/loss_weight"]
    by_hand = (entropy * weight).sum((1, 2)) / weight.sum((1, 2))
    assert_near(golden["out/train_loss"], by_hand.mean(), TOLERANCE)


def test_unreplaced_tokens_count_less_with_less_noise() -> None:
    replaced, t = torch.tensor([[[True, False]]]).expand(3, -1, -1), torch.tensor([0.0, 0.5, 1.0])
    assert_near(token_weight(replaced, t), torch.tensor([[[1.0, 0.3]], [[1.0, 0.65]], [[1.0, 1.0]]]), 1e-6)


INVALID = {"smoothing": 1.0, "places": -1, "focus": 0.0, "drop": 2.0, "text_drop": -0.5}


@pytest.mark.parametrize("key", INVALID)
def test_values_out_of_range_are_named(key: str) -> None:
    with pytest.raises(ValueError, match=rf"\[noise\] {key} .*{INVALID[key]}$"):
        from_table(TokenNoiseConfig, {key: INVALID[key]}, "noise")


def test_v_is_one_over_the_signal_up_to_the_cap() -> None:
    golden = Golden("schedule_tables")
    t, signal = golden["in/t"], golden["out/alpha_cumprod_scaler1"]
    weights = noise_weight(NoiseConfig(weight="v", cap=9.0), t)
    below = 1 / signal < 8.9
    torch.testing.assert_close(weights[below], 1 / signal[below], rtol=1e-4, atol=0)
    assert below.any() and (1 / signal > 9.1).any() and weights[1 / signal > 9.1].eq(9).all()


def test_v_is_the_loss_of_v_prediction() -> None:
    """v = sqrt(a) noise - sqrt(1-a) x0: an error e of the noise moves x0 by sqrt((1-a)/a) e, so v by e / sqrt(a)."""
    t = torch.tensor([0.1, 0.5, 0.8], dtype=torch.float64)
    x0, noise, error = (torch.randn(3, 5, dtype=torch.float64, generator=rng(i)) for i in range(3))
    signal = (1 / noise_weight(NoiseConfig(weight="v"), t))[:, None]
    noised = signal.sqrt() * x0 + (1 - signal).sqrt() * noise
    guess = noise + error
    guess_x0 = (noised - (1 - signal).sqrt() * guess) / signal.sqrt()
    v, guess_v = (signal.sqrt() * e - (1 - signal).sqrt() * x for e, x in ((noise, x0), (guess, guess_x0)))
    loss = noise_loss(NoiseConfig(weight="v"), guess.float(), noise.float(), t.float())
    assert loss.item() == pytest.approx((guess_v - v).square().mean().item(), rel=1e-4)


def test_x0_is_the_squared_error_of_the_image() -> None:
    t = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    x0, noise, error = (torch.randn(3, 5, dtype=torch.float64, generator=rng(i)) for i in range(3))
    signal = alpha_bar(t)[:, None]
    noised = signal.sqrt() * x0 + (1 - signal).sqrt() * noise
    guess_x0 = (noised - (1 - signal).sqrt() * (noise + error)) / signal.sqrt()
    loss = noise_loss(NoiseConfig(weight="x0"), (noise + error).float(), noise.float(), t.float())
    assert loss.item() == pytest.approx((guess_x0 - x0).square().mean().item(), rel=1e-4)


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_is_the_images_squared_error_weighted_by_the_limited_snr(gamma: float) -> None:
    """The definition in arXiv 2303.09556: an image's squared error weighted by min(SNR, gamma)."""
    t = torch.tensor([0.02, 0.2, 0.5, 0.8], dtype=torch.float64)
    snr = alpha_bar(t) / (1 - alpha_bar(t))
    of_image = noise_weight(NoiseConfig(weight="x0", cap=math.inf), t)  # the same error in terms of the noise
    config = NoiseConfig(weight="min_snr", min_snr_gamma=gamma)
    torch.testing.assert_close(noise_weight(config, t), snr.clamp(max=gamma) * of_image)
    assert (snr > gamma).any() and (snr < gamma).any()


def test_the_noise_loss_weights_each_sample_by_its_time() -> None:
    t = torch.tensor([0.2, 0.9])
    noise = torch.zeros(2, 1, 2, 2)
    predicted = torch.stack([torch.full((1, 2, 2), 2.0), torch.full((1, 2, 2), 3.0)])
    config = NoiseConfig()
    expected = (4 * noise_weight(config, t)[0] + 9 * noise_weight(config, t)[1]) / 2
    assert_near(noise_loss(config, predicted, noise, t), expected, 1e-6)


@pytest.mark.parametrize("stratified", [False, True])
def test_times_cover_the_range_and_some_are_exactly_1(stratified: bool) -> None:
    t = draw_times(NoiseConfig(stratified=stratified), 0, StepRandom(0, 0, DRAWS))
    assert 0.001 <= t.min() < 0.002 and t.max() == 1
    fraction = t.eq(1).float().mean().item()
    spread = 1e-4 if stratified else 4 * math.sqrt(0.075 * 0.925 / DRAWS)
    assert abs(fraction - 0.075) < spread


def test_stratified_times_have_one_in_each_stratum_in_random_order() -> None:
    count = 16
    t = draw_times(NoiseConfig(stratified=True), 0, StepRandom(0, 0, count))
    uniform = 1 - (t[t < 1] - 0.001) / 1.08
    strata = (uniform * count).floor().long()
    assert len(strata.unique()) == len(strata) >= count - 2
    assert not torch.equal(strata, strata.sort().values)


def test_focus_draws_more_times_near_1_but_not_more_of_exactly_1() -> None:
    t, even = (draw_times(NoiseConfig(focus=focus), 0, StepRandom(0, 0, DRAWS)) for focus in (2.0, 1.0))
    torch.testing.assert_close(1 - t, (1 - even).square())
    assert ((t == 1) != (even == 1)).float().mean().item() < 1e-3  # values very near 1 round to it
    assert (t > 0.75).float().mean().item() > 0.5 > (even > 0.75).float().mean().item()


def test_the_regression_uses_one_time() -> None:
    config = NoiseConfig(regression=10, stratified=True)
    assert draw_times(config, 9, StepRandom(0, 0, 16)).eq(0.95).all()
    later, plain = (draw_times(one, 10, StepRandom(0, 0, 16)) for one in (config, NoiseConfig(stratified=True)))
    assert torch.equal(later, plain)


def test_time_mappers_are_not_trained_on_fast_frequencies() -> None:
    """Between t = 0.5 and 0.501 the untrained frequencies move, and the trained ones hardly do."""
    block = TimestepBlock(4, 64)
    before = block.mapper.weight.detach().clone()
    freeze_fast_times(torch.nn.Sequential(block))
    block(torch.randn(2, 4, 1, 1, generator=rng()), timestep_embedding(torch.tensor([0.2, 0.7]), 64)).sum().backward()
    torch.optim.SGD(block.parameters(), lr=1.0).step()
    moved = (block.mapper.weight - before).detach().ne(0).any(0)
    one, other = timestep_embedding(torch.tensor([0.5, 0.501]), 64)
    assert moved.sum() == 32 and (one - other)[moved].abs().max() < 0.1 < (one - other)[~moved].abs().max()


def test_fractions_of_features_are_dropped_and_noised() -> None:
    features = features_from_latents(torch.randn(DRAWS, 4, 2, 2, generator=rng(1)))
    out = corrupt_features(DecoderNoiseConfig(), features, StepRandom(0, 0, DRAWS), PriorParams())
    dropped = out.flatten(1).eq(0).all(1)
    unchanged = out.flatten(1).eq(features.flatten(1)).all(1)
    noised = ~(dropped | unchanged)
    for fraction, expected in ((dropped, 0.05), (noised, 0.3 * 0.95), (unchanged, 0.7 * 0.95)):
        assert abs(fraction.float().mean().item() - expected) < 4 * math.sqrt(expected * (1 - expected) / DRAWS)
    # Noise is added in the prior's space, up to t = 0.5, where half the variance is left (cosine schedule).
    before, after = (latents_from_features(x[noised]).flatten(1) for x in (features, out))
    assert after.std().item() == pytest.approx(1, abs=0.02)
    alike = torch.nn.functional.cosine_similarity(before, after).mean().item()
    assert math.sqrt(0.5) + 0.05 < alike < 0.97


def test_fractions_of_0_and_1_are_exact() -> None:
    features = torch.randn(64, 4, 2, 2, generator=rng(1))
    assert torch.equal(
        corrupt_features(DecoderNoiseConfig(drop=0, noised=0), features, StepRandom(0, 0, 64), PriorParams()), features
    )
    assert corrupt_features(DecoderNoiseConfig(drop=1), features, StepRandom(0, 0, 64), PriorParams()).eq(0).all()
    noised = corrupt_features(DecoderNoiseConfig(drop=0, noised=1), features, StepRandom(0, 0, 64), PriorParams())
    assert not noised.flatten(1).eq(features.flatten(1)).any(1).any()


def test_the_contrastive_loss_against_a_double_loop() -> None:
    texts, images = (torch.nn.functional.normalize(torch.randn(5, 8, generator=rng(i)), dim=-1) for i in range(2))
    scale = 7.0
    total = 0.0
    for i in range(5):
        rows = [math.exp(scale * float(texts[i] @ images[j])) for j in range(5)]
        columns = [math.exp(scale * float(texts[j] @ images[i])) for j in range(5)]
        total -= math.log(rows[i] / sum(rows)) + math.log(columns[i] / sum(columns))
    assert contrastive_loss(texts, images, torch.tensor(scale)).item() == pytest.approx(total / 10, abs=1e-5)


def test_per_sample_and_shared_numbers_differ() -> None:
    for step in range(50):
        assert not torch.isclose(StepRandom(0, step, 1).uniform(), StepRandom(0, step, 1).uniform(1)[:, 0]).any()


def test_debiased_weights_the_noise_by_the_root_of_its_ratio_to_the_signal() -> None:
    """arXiv 2310.08442: the geometric mean of the error of the image and that of the noise."""
    t = torch.tensor([0.02, 0.2, 0.5, 0.8, 1.0], dtype=torch.float64)
    of_image, of_noise = (noise_weight(NoiseConfig(weight=x, cap=math.inf), t) for x in ("x0", "none"))
    torch.testing.assert_close(noise_weight(NoiseConfig(weight="debiased"), t), (of_image * of_noise).sqrt())


@pytest.mark.parametrize(("loss", "expected"), [("mse", (0.04 + 9) / 2), ("l1", 1.6), ("huber", (0.02 + 1.375) / 2)])
def test_huber_is_squared_for_small_errors_and_linear_for_large_ones(loss: str, expected: float) -> None:
    error = torch.tensor([[0.2, -3.0]])
    delta = {"huber_delta": 0.5} if loss == "huber" else {}
    config = NoiseConfig(loss=loss, weight="none", **delta)  # 0.5 (3 - 0.25) = 1.375
    loss_value = noise_loss(config, error, torch.zeros(1, 2), torch.tensor([0.5]))
    assert loss_value.item() == pytest.approx(expected)


def test_the_offset_is_predicted_and_the_perturbation_is_not() -> None:
    config, shape = NoiseConfig(offset=3.0, perturbation=0.5), (4, 8, 8)
    added, predicted = draw_noise(config, shape, StepRandom(0, 0, 64))
    assert torch.equal(added, draw_noise(config, shape, StepRandom(0, 0, 64))[0])
    plain, same = draw_noise(NoiseConfig(), shape, StepRandom(0, 0, 64))
    assert plain is same
    offset, perturbation = predicted - plain, (added - predicted) / 0.5
    torch.testing.assert_close(offset, offset[..., :1, :1].expand_as(offset), rtol=0, atol=1e-5)
    assert offset[..., 0, 0].std().item() == pytest.approx(3, rel=0.2)
    assert perturbation.std().item() == pytest.approx(1, abs=0.02)


def test_logit_normal_times_have_their_median_and_width() -> None:
    config = NoiseConfig(distribution="logit_normal", logit_mean=0.7, logit_std=0.5, stratified=True)
    logits = draw_times(config, 0, StepRandom(0, 0, DRAWS)).double().logit()
    assert logits.mean().item() == pytest.approx(0.7, abs=1e-3) and logits.std().item() == pytest.approx(0.5, rel=1e-2)


@pytest.mark.parametrize("distribution", ["original", "uniform", "logit_normal"])
def test_times_are_scaled_to_their_range(distribution: str) -> None:
    whole, part = (
        draw_times(NoiseConfig(distribution=distribution, focus=2.0, time_range=x), 0, StepRandom(0, 0, DRAWS))
        for x in ((0.0, 1.0), (0.25, 0.75))
    )
    torch.testing.assert_close(part, 0.25 + whole / 2)
    assert 0.25 <= part.min() < 0.3 and 0.7 < part.max() <= 0.75
    assert whole.eq(1).float().mean().item() == pytest.approx(0.075 if distribution == "original" else 0, abs=0.01)
    with pytest.raises(ValueError, match="time_range"):
        NoiseConfig(time_range=(0.5, 0.5))


@pytest.mark.parametrize("key", ["min_snr_gamma", "huber_delta", "logit_mean", "logit_std"])
def test_keys_without_effect_are_refused(key: str) -> None:
    with pytest.raises(ValueError, match=key):
        from_table(NoiseConfig, {key: 2.0}, "noise")
