"""The pipeline on a tiny random model, and its numbers on the golden chain."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.cli_runs import PROMPT, ROUNDING, latents, pixels
from helpers.golden_data import Golden, assert_near
from helpers.recorded_noise import replay
from helpers.tiny_model import METADATA, write_tiny_bundle
from PIL import Image
from torch import Tensor

from wuerstchen_core import WuerstchenPipeline
from wuerstchen_core.checkpoints import demo_path
from wuerstchen_core.diffusion.samplers import SAMPLERS, NoiseSource
from wuerstchen_core.diffusion.schedule import linear_times, squared_times
from wuerstchen_core.inference import stages
from wuerstchen_core.inference.settings import V1, SamplingSettings
from wuerstchen_core.models.decoder import Decoder, DecoderParams
from wuerstchen_core.models.prior import Prior, PriorParams
from wuerstchen_core.models.text_encoder import TextEncoder
from wuerstchen_core.models.vqgan import VQGAN, VQGANParams


@pytest.fixture(scope="module")
def pipe(bundle: Path) -> WuerstchenPipeline:
    return WuerstchenPipeline.load(bundle, device="cpu", dtype="fp32")


# the chain


def test_the_golden_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    def network(kind: Any, params: Any, name: str) -> Any:
        golden = Golden(name)
        built = kind(params(**golden.sizes())).eval().requires_grad_(False)
        built.load_state_dict(golden.weights())
        return built

    golden = Golden("e2e_v2_small")
    pipe = WuerstchenPipeline(
        prior=network(Prior, PriorParams, "prior_small"),
        decoder=network(Decoder, DecoderParams, "diffnext_small"),
        vqgan=network(VQGAN, VQGANParams, "vqmodel_small"),
    )
    recorded = {
        "prior": ("in/prior_x_T", "in/prior_phase0_noise", "in/prior_phase1_noise"),
        "decoder": ("in/decoder_x_T", "in/decoder_noise"),
    }

    def noise_of(stage: str) -> Callable[[int, int], NoiseSource]:
        first, *rest = recorded[stage]
        draws = [golden[first], *(noise for key in rest for noise in golden[key])]
        return lambda seed, count: replay(*draws)

    height, width = golden["out/image"].shape[-2:]
    sampling = SamplingSettings(width=width, height=height)  # the published defaults
    monkeypatch.setattr(stages, "seeded_noise", noise_of("prior"))
    features = pipe.sample_prior(golden["in/c_prior"], sampling, negative=golden["in/c_prior_uncond"])
    assert_near(features, golden["out/image_embeddings"], 5e-4)  # observed 5e-5
    monkeypatch.setattr(stages, "seeded_noise", noise_of("decoder"))
    stage_a = pipe.sample_decoder(features, golden["in/clip_decoder"], sampling)
    assert_near(stage_a / 0.3764, golden["out/decoder_preds"][-1], 2e-4)  # observed 2e-5
    expected = golden["out/image"].clamp(0, 1).permute(0, 2, 3, 1).numpy() * 255
    assert np.abs(pixels(pipe.decode(stage_a)) - expected).max() < 0.51  # rounding, and 1e-5 * 255


# seeds


def test_a_batch_equals_its_singles(pipe: WuerstchenPipeline) -> None:
    prompts = [PROMPT, "a small apple on blue", ""]
    batch = latents(pipe, prompts, seed=5)
    for i, prompt in enumerate(prompts):
        for many, one in zip(batch, latents(pipe, [prompt], seed=5 + i), strict=True):
            assert_near(many[i : i + 1], one, 1e-5 * float(one.abs().max().clamp(min=1)))


def test_pictures_are_counted_prompt_by_prompt(pipe: WuerstchenPipeline) -> None:
    images = pixels(pipe.generate([PROMPT, "a blue apple"], count=2, seed=3))
    singles = [(PROMPT, 3), (PROMPT, 4), ("a blue apple", 5), ("a blue apple", 6)]
    for image, (prompt, seed) in zip(images, singles, strict=True):
        assert np.abs(image - pixels(pipe.generate(prompt, seed=seed))[0]).max() <= ROUNDING
    assert np.abs(images[0] - images[1]).max() > ROUNDING


def test_prompts_of_an_iterator_are_stored_in_the_pictures(pipe: WuerstchenPipeline) -> None:
    prompts = [PROMPT, "a blue apple"]
    images = pipe.generate(iter(prompts), prior_steps=1, decoder_steps=1)
    assert [json.loads(image.info["wuerstchen"])["prompt"] for image in images] == prompts


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 2},
        {"negative": "small " * 70},
        {"prior_guidance": 4.0},
        {"prior_steps": 4},
        {"schedule": "diffusers"},
        {"decoder_steps": 3},
        {"decoder_guidance": 3.0},
        {"decoder_guidance": 3.0, "negative": "blue", "prior_guidance": 1.0},
    ],
    ids=str,
)
def test_each_argument_changes_the_picture(pipe: WuerstchenPipeline, change: dict[str, Any]) -> None:
    assert np.abs(pixels(pipe.generate(PROMPT)) - pixels(pipe.generate(PROMPT, **change))).max() > ROUNDING


def test_no_guidance_means_no_negative_prompt(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pipe, read = WuerstchenPipeline.load(bundle, device="cpu", dtype="fp32"), []
    encode = TextEncoder.encode
    monkeypatch.setattr(TextEncoder, "encode", lambda tower, texts: read.extend(texts) or encode(tower, texts))
    plain = pixels(pipe.generate(PROMPT, prior_guidance=1.0))
    assert read == [PROMPT] and not caplog.records
    for _ in range(2):
        found = pixels(pipe.generate(PROMPT, prior_guidance=0.0, negative="blue"))
        assert np.abs(plain - found).max() <= ROUNDING
    assert "blue" not in read and len(caplog.records) == 1
    for guided in ({"prior_guidance": 2.0}, {"prior_guidance": 1.0, "decoder_guidance_end": 2.0}):
        pipe.generate(PROMPT, negative="blue", **guided)
        assert read.pop() == "blue"


def test_guidance_of_the_decoder_leads_away_from_no_features(pipe: WuerstchenPipeline) -> None:
    """With the prompt as the negative prompt, the two halves differ in their features only."""
    [features, plain], (_, text) = latents(pipe, [PROMPT], seed=0), pipe.encode_text([PROMPT])
    guided = pipe.sampling.updated(decoder_guidance=3.0)
    latents_b = pipe.sample_decoder(features, text, guided, negative=text)
    assert float((latents_b - plain).std() / plain.std()) > 0.01


# text


def test_long_texts_are_encoded_in_pieces(pipe: WuerstchenPipeline) -> None:
    """A long prompt has the states of its pieces of 75 tokens; "a" is one token."""
    words = ["a"] * 80 + ["small"] * 80
    [states], _ = pipe.encode_text([" ".join(words)])
    pieces, _ = pipe.encode_text([" ".join(words[i : i + 75]) for i in range(0, 160, 75)])
    assert_near(states, pieces.flatten(0, 1), 1e-5)
    full, more = (pipe.encode_text([" ".join(words[:n])])[0] for n in (75, 76))
    assert full.shape[1] == 77 and more.shape[1] == 154


def test_texts_of_different_lengths_equal_their_singles(pipe: WuerstchenPipeline) -> None:
    long = "a red apple on " * 30
    images = pixels(pipe.generate([PROMPT, long, PROMPT], seed=3, negative="blue " * 80))
    for i, prompt in enumerate([PROMPT, long, PROMPT]):
        [alone] = pixels(pipe.generate(prompt, seed=3 + i, negative="blue " * 80))
        assert np.abs(images[i] - alone).max() <= ROUNDING
    cut = pixels(pipe.generate(long[: 15 * 15], seed=4, negative="blue " * 80))[0]
    assert np.abs(images[1] - cut).max() > ROUNDING
    with pytest.raises(ValueError, match="one by one"):
        pipe.encode_text([PROMPT, long])


# sizes and numbers


@pytest.mark.parametrize(("width", "height"), [(64, 64), (192, 128), (2048, 64), (64, 2048)])
def test_sizes(pipe: WuerstchenPipeline, width: int, height: int) -> None:
    [image] = pipe.generate(PROMPT, width=width, height=height)
    assert image.size == (width, height) and image.mode == "RGB"


def test_the_models_own_size(pipe: WuerstchenPipeline) -> None:
    assert pipe.generate(PROMPT)[0].size == (128, 64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 100}, "128x64$"),
        ({"width": 4096, "height": 256}, "2048x256$"),
        ({"height": 0}, "128x64$"),
        ({"prior_steps": 0}, "0 .*steps"),
        ({"decoder_steps": 0}, "0 .*steps"),
        ({"schedule": "cosine"}, "cosine"),
        ({"schedule": "original", "prior_steps": 12}, "30 steps, not 12"),
        ({"schedule": "fast", "prior_steps": 12}, "6 steps, not 12"),
        ({"sampler": "euler"}, "euler"),
        ({"prior_guidance": float("nan")}, "guidance nan"),
        ({"seed": -1}, "seed -1"),
        ({"seed": 2**63 - 1}, f"from 0 to {2**63 - 2}"),
        ({"count": 0}, "count of 1"),
        ({"prompt": []}, "at least one prompt"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_invalid_settings_are_refused_before_any_work(
    pipe: WuerstchenPipeline, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(TextEncoder, "forward", lambda *args: pytest.fail("work has begun"))
    with pytest.raises(ValueError, match=message):
        pipe.generate(**{"prompt": PROMPT, **options})


def test_defaults_are_the_published_ones() -> None:
    assert SamplingSettings.from_metadata({}) == SamplingSettings(1024, 1024, "original", 30, 4.0, 12, 1.0)
    assert SamplingSettings.from_metadata(METADATA) == SamplingSettings(128, 64, "linear", 3, 2.0, 2, 1.0)
    assert SamplingSettings.from_metadata(METADATA).updated(schedule="diffusers").prior_steps == 29
    assert SamplingSettings().updated(prior_steps=8).schedule == "linear"


def test_the_fast_schedule_sets_the_steps_of_both_stages() -> None:
    fast = SamplingSettings().updated(schedule="fast")
    assert (fast.prior_steps, fast.decoder_steps) == (6, 4) and fast.sampler == "ddim"
    assert SamplingSettings.from_metadata({"sampling": {"schedule": "fast"}}) == fast
    assert torch.equal(fast.prior_times(), squared_times(6)) and torch.equal(fast.decoder_times(), linear_times(4))
    assert SamplingSettings().updated(schedule="fast", decoder_steps=7).decoder_steps == 7
    assert fast.updated(decoder_steps=7).prior_steps == 6
    assert SamplingSettings().updated(schedule="fast", sampler="ddpm").sampler == "ddpm"
    for other in ({"schedule": "original"}, {"prior_steps": 8}):
        assert (fast.updated(**other).sampler, fast.updated(**other).decoder_steps) == ("ddpm", 12)
    assert fast.updated(decoder_steps=7).updated(schedule="fast").decoder_steps == 7
    assert V1.updated(schedule="fast").decoder_steps == V1.decoder_steps  # tokens were not measured


def test_turbo_keeps_what_a_distilled_model_states() -> None:
    student = SamplingSettings(schedule="turbo", sampler="ddim", prior_steps=2, decoder_steps=1)
    assert student.updated(prior_steps=3) == replace(student, prior_steps=3)
    assert student.updated(prior_steps=3, schedule="linear") == replace(
        student, prior_steps=3, schedule="linear", sampler="ddpm"
    )
    fast = SamplingSettings().updated(schedule="fast")
    assert fast.updated(schedule="turbo") == replace(fast, schedule="turbo")
    assert student.updated(schedule="fast") == replace(fast, decoder_steps=4)


def test_the_sampler_reaches_stage_c(pipe: WuerstchenPipeline) -> None:
    fast = pipe.sampling.updated(schedule="fast")
    text, _ = pipe.encode_text([PROMPT])
    runs = {name: pipe.sample_prior(text, fast.updated(sampler=name), seed=1) for name in SAMPLERS}
    assert torch.equal(pipe.sample_prior(text, fast, seed=1), runs["ddim"])
    for a, b in combinations(runs.values(), 2):
        assert not torch.allclose(a, b, atol=0.01)


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_generates(pipe: WuerstchenPipeline, name: str) -> None:
    """A batch equals its singles, and a masked edit generates inside the mask only."""
    two = pixels(pipe.generate(PROMPT, sampler=name, count=2, seed=3))
    assert np.abs(two[1] - pixels(pipe.generate(PROMPT, sampler=name, seed=4))[0]).max() <= ROUNDING
    picture, mask = Image.fromarray(two[0].astype(np.uint8)), Image.new("L", (128, 64))
    mask.paste(255, (64, 0, 128, 64))
    [edited] = pixels(pipe.inpaint(picture, mask, "small " * 70, sampler=name))
    assert np.array_equal(edited[:, :64], two[0][:, :64]) and np.abs(edited - two[0]).max() > ROUNDING


# callbacks


def test_callback(pipe: WuerstchenPipeline) -> None:
    seen: list[tuple[str, int, int]] = []
    shapes: dict[str, Any] = {}
    last: dict[str, Tensor] = {}

    def callback(stage: str, done: int, steps: int, denoised: Tensor | None) -> None:
        seen.append((stage, done, steps))
        shapes[stage] = None if denoised is None else tuple(denoised.shape)
        if denoised is not None:
            last[stage] = denoised

    pipe.generate(PROMPT, callback=callback)
    prior = [("prior", i, 3) for i in (1, 2, 3)]
    assert seen == [("text", 1, 1), *prior, ("decoder", 1, 2), ("decoder", 2, 2), ("picture", 1, 1)]
    assert shapes == {"text": None, "prior": (1, 16, 2, 3), "decoder": (1, 4, 16, 32), "picture": None}
    features, latents_b = latents(pipe, [PROMPT], seed=0)
    # After the last step what is left of the noise is 1 % (alpha_bar ends at 0.9999), in the units of each stage.
    assert float((last["prior"] - features).std() / features.std()) < 0.1
    assert float((last["decoder"] - latents_b).std() / latents_b.std()) < 0.1


def test_a_callback_stops_the_work(pipe: WuerstchenPipeline) -> None:
    class Stop(Exception):
        pass

    def callback(stage: str, done: int, steps: int, denoised: Tensor | None) -> None:
        if (stage, done) == ("prior", 2):
            raise Stop
        assert stage in ("text", "prior")

    with pytest.raises(Stop):
        pipe.generate(PROMPT, callback=callback)


# words


def test_unknown_words_are_reported_once(bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
    pipe = WuerstchenPipeline.load(bundle, device="cpu")
    pipe.generate("a red Zebra on a blu castle", negative="fog")
    pipe.generate("a zebra in fog")
    first, second = caplog.records
    assert first.levelno == logging.WARNING
    words, more = first.getMessage().splitlines()
    assert all(word in words for word in ('"zebra"', '"blu"', '"castle"', '"fog"')) and words.endswith(": blue")
    assert f"inspect {bundle} --words" in more
    assert '"in"' in second.getMessage() and "zebra" not in second.getMessage()


def test_a_size_far_from_the_models_own_is_reported_once(bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
    pipe = WuerstchenPipeline.load(bundle, device="cpu")
    for factor in (1, 2, 2):
        pipe.generate("a red apple", width=factor * 128, height=factor * 64)
    [record] = caplog.records
    assert "256x128" in record.getMessage() and "91x91" in record.getMessage()


def test_known_words_are_not_warned_of(pipe: WuerstchenPipeline, caplog: pytest.LogCaptureFixture) -> None:
    pipe.generate("A small red apple, on blue.")
    assert not caplog.records


def test_a_model_without_a_word_list_never_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_tiny_bundle(tmp_path / "free.safetensors", {"sampling": METADATA["sampling"]})
    WuerstchenPipeline.load(path, device="cpu").generate("a zebra")
    assert not caplog.records


# the shipped model


@pytest.mark.skipif(not demo_path().is_file(), reason="the shipped model is not trained yet")
def test_the_shipped_model_follows_a_prompt() -> None:
    from tools.demo.judge import Judge
    from wuerstchen_core.demo.vocabulary import COLOURS, SIZES, THINGS, Scene

    demo = WuerstchenPipeline.load("demo", device="cpu")
    [image] = demo.generate("a red apple on a blue background", width=256, height=256, seed=1)
    apple = Scene(
        [thing.name for thing in THINGS].index("red apple"), list(COLOURS).index("blue"), list(SIZES).index("large")
    )
    assert Judge().identify(np.asarray(image), apple) == apple
    assert demo.sampling.width == demo.sampling.height == 256
    denoised: list[Tensor] = []
    [image] = demo.generate(
        "a red apple on a blue background",
        seed=1,
        sampler="dpmpp_2m",
        callback=lambda stage, done, steps, x: denoised.append(x) if x is not None else None,
    )
    assert Judge().identify(np.asarray(image), apple) == apple
    assert len(denoised) == 6 + 1 and all(x.isfinite().all() for x in denoised)


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("prior", "Stage C"),
        ("decoder", "Stage B"),
        ("vqgan", "Stage A"),
        ("image_encoder", "image encoder"),
        ("prior_text_encoder", "text encoder"),
    ],
)
def test_the_network_that_diverges_is_named(bundle: Path, part: str, name: str) -> None:
    pipe = WuerstchenPipeline.load(bundle, device="cpu")
    weight = [x for x in pipe.require(part).parameters() if x.ndim > 1][-1]
    weight.data.view(-1)[0] = float("inf")
    with pytest.raises(ValueError, match=name):
        pipe.generate("a red apple") if part != "image_encoder" else pipe.variations(Image.new("RGB", (64, 64)))
