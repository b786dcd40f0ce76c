"""v1 in the pipeline: the original's chain at small size, and a tiny random model."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.cli_runs import pixels, run
from helpers.golden_data import Golden, assert_near
from helpers.networks import PRIOR
from helpers.recorded_noise import RecordedTokenNoise, replay
from helpers.tiny_model import tiny_parts, write_tiny_bundle
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from wuerstchen_core import WuerstchenPipeline
from wuerstchen_core.checkpoints import PARTS_OF, describe, load_prior, load_token_decoder, read_metadata, save_bundle
from wuerstchen_core.inference import stages
from wuerstchen_core.inference.settings import SamplingSettings
from wuerstchen_core.models.prior import V1, Prior, PriorParams
from wuerstchen_core.models.token_decoder import TokenDecoder, TokenDecoderParams
from wuerstchen_core.models.vqgan import VQGAN, VQGANParams

PROMPTS = ["a red apple", "a small apple on blue"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bundle(tmp_path_factory.mktemp("model") / "tiny.safetensors", release="v1")


@pytest.fixture(scope="module")
def pipe(bundle: Path) -> WuerstchenPipeline:
    return WuerstchenPipeline.load(bundle, device="cpu", dtype="fp32")


class Chain(RecordedTokenNoise):
    """The recorded random numbers of Stage B, including the initial tokens."""

    def __init__(self, golden: Golden):
        super().__init__(golden["in/token_renoise_uniform"], None)
        self.first = golden["in/token_init_noise"]

    def tokens(self, num_labels: int, height: int, width: int) -> Tensor:
        return self.first


def test_the_golden_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    def network(kind: Any, params: Any, name: str, **units: float) -> Any:
        golden = Golden(name)
        built = kind(params(**golden.sizes(), **units)).eval().requires_grad_(False)
        built.load_state_dict(golden.under("weights/") if kind is TokenDecoder else golden.weights())
        return built

    golden = Golden("e2e_v1_small")
    pipe = WuerstchenPipeline(
        prior=network(Prior, PriorParams, "prior_small", feature_scale=1.0, feature_shift=0.0),
        token_decoder=network(TokenDecoder, TokenDecoderParams, "paella_small"),
        vqgan=network(VQGAN, VQGANParams, "vqmodel_small"),
    )
    assert pipe.version == "v1"
    config = golden.config
    height, width = golden["out/image"].shape[-2:]
    sampling = pipe.sampling.updated(
        width=width, height=height, prior_steps=config["prior_steps"], token_mode=config["mode"]
    )
    # The other values of the golden configuration are the defaults.
    assert sampling.prior_guidance == config["prior_cfg"] and sampling.decoder_steps == config["token_steps"]
    assert sampling.temperature == config["temperature"] and sampling.decoder_guidance == config["cfg"][0]
    draws: Iterable[Tensor] = [golden["in/prior_x_T"], *golden["in/prior_noise"]]
    monkeypatch.setattr(stages, "seeded_noise", lambda seed, count: replay(*draws))
    monkeypatch.setattr(stages, "SeededTokenNoise", lambda seed, count: Chain(golden))
    features = pipe.sample_prior(golden["in/c"], sampling, negative=golden["in/c_uncond"])
    latents_b = pipe.sample_decoder(features, golden["in/c"], sampling, negative=golden["in/c_uncond"])
    assert pipe.vqgan is not None
    assert torch.equal(pipe.vqgan.quantize(latents_b).indices, golden["out/tokens"])
    assert_near(pipe.vqgan.decode(latents_b), golden["out/image"], 1e-5)


def test_the_published_defaults() -> None:
    sampling = SamplingSettings.from_metadata({}, "v1")
    assert (sampling.width, sampling.height) == (512, 512)
    assert (sampling.schedule, sampling.prior_steps, sampling.prior_guidance) == ("linear", 60, 6.0)
    assert (sampling.decoder_steps, sampling.decoder_guidance) == (8, 2.0)
    assert sampling.temperatures()[0] == 1.0 and sampling.temperatures()[-1] == pytest.approx(0.6)


def test_a_bundle_knows_its_release(bundle: Path, pipe: WuerstchenPipeline) -> None:
    assert read_metadata(bundle)["version"] == "v1" == pipe.version
    assert describe(bundle).version == "v1" and describe(bundle).missing == ()
    assert load_prior(bundle).params.feature_scale == V1["feature_scale"]
    assert isinstance(load_token_decoder(bundle), TokenDecoder)
    assert [getattr(pipe, name) is not None for name in PARTS_OF["v1"]] == [True] * 6
    assert pipe.decoder is None


@pytest.mark.parametrize("mode", ["multinomial", "argmax", "quantised"])
def test_a_batch_equals_its_singles(pipe: WuerstchenPipeline, mode: str) -> None:
    both = pixels(pipe.generate(PROMPTS, seed=3, token_mode=mode))
    assert both.shape == (2, 64, 128, 3) and both.std() > 1
    for i, prompt in enumerate(PROMPTS):
        assert np.abs(pixels(pipe.generate(prompt, seed=3 + i, token_mode=mode))[0] - both[i]).max() <= 1


def test_every_setting_changes_the_picture(pipe: WuerstchenPipeline) -> None:
    plain = pixels(pipe.generate(PROMPTS[0], seed=1))
    others = (
        {"seed": 2},
        {"seed": 1, "decoder_guidance": 1.0},
        {"seed": 1, "decoder_guidance_end": 8.0},
        {"seed": 1, "temperature": (0.1, 0.1)},
        {"seed": 1, "token_mode": "argmax"},
        {"seed": 1, "decoder_steps": 3},
    )
    for other in others:
        assert not np.array_equal(pixels(pipe.generate(PROMPTS[0], **other)), plain), other


def test_reconstruct(pipe: WuerstchenPipeline) -> None:
    seen: list[tuple[str, int, int]] = []

    def watch(stage: str, done: int, steps: int, denoised: Tensor | None) -> None:
        assert denoised is None or denoised.shape == (1, 4, 64, 64)
        seen.append((stage, done, steps))

    [image] = pipe.reconstruct(Image.linear_gradient("L").convert("RGB"), callback=watch)
    assert image.size == (256, 256)
    assert [step for step in seen if step[0] == "decoder"] == [("decoder", i, 2) for i in (1, 2)]


@pytest.mark.parametrize("temperature", [(0.0, 1.0), (1.0,), (1.0, float("inf")), 0.7, "12", (2, "1"), None, [1, True]])
def test_a_temperature_that_cannot_be_used(pipe: WuerstchenPipeline, temperature: Any) -> None:
    with pytest.raises(ValueError, match="temperature"):
        replace(pipe.sampling, temperature=temperature)


def test_a_temperature_of_numpy(pipe: WuerstchenPipeline) -> None:
    assert pipe.sampling.updated(temperature=np.array([1.0, 0.5])).temperature == (1.0, 0.5)


def test_an_unknown_mode(pipe: WuerstchenPipeline) -> None:
    with pytest.raises(ValueError, match="quant.*multinomial, argmax, quantised"):
        pipe.generate(PROMPTS[0], token_mode="quant")


def test_a_model_without_tokens_says_so(tmp_path: Path) -> None:
    v2 = WuerstchenPipeline.load(write_tiny_bundle(tmp_path / "v2.safetensors"), device="cpu")
    options: dict[str, Any]
    for options in ({"temperature": (1.0, 0.5)}, {"token_mode": "argmax"}):
        for method, argument in ((v2.generate, PROMPTS[0]), (v2.reconstruct, Image.new("RGB", (64, 64)))):
            with pytest.raises(ValueError, match=f"v1.*{next(iter(options))}"):
                method(argument, **options)
    # The metadata of a Stage A that comes from a v1 bundle.
    assert SamplingSettings.from_metadata({"sampling": {"token_mode": "argmax"}}) == SamplingSettings()


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_generates(bundle: Path, dtype: str) -> None:
    half = WuerstchenPipeline.load(bundle, device="cpu", dtype=dtype)
    assert pixels(half.generate(PROMPTS[0], decoder_steps=2)).std() > 0.5  # NaN would be black all over


def test_the_command_lines_settings_reach_the_sampler(bundle: Path, pipe: WuerstchenPipeline, tmp_path: Path) -> None:
    options = ["--temperature", "0.9", "0.3", "--token-mode", "argmax", "--decoder-guidance-end", "3"]
    path = tmp_path / "apple.png"
    assert run("generate", PROMPTS[0], "--model", bundle, "--output", path, "--dtype", "fp32", *options) == 0
    [image] = pipe.generate(PROMPTS[0], temperature=(0.9, 0.3), token_mode="argmax", decoder_guidance_end=3.0)
    with Image.open(path) as saved:
        assert np.abs(pixels([saved]) - pixels([image])).max() <= 1
        assert json.loads(saved.text["wuerstchen"])["temperature"] == [0.9, 0.3]


@pytest.mark.parametrize(("other", "release"), [("token_decoder", "v1"), ("decoder", "v2"), ("vqgan", "v1")])
def test_stage_b_determines_the_release_of_a_prior(tmp_path: Path, other: str, release: str) -> None:
    """A bare prior 1024 wide may be v1's or v2's of June 2023."""
    prior = Prior(replace(PRIOR, c_cond=1024))
    save_file(prior.state_dict(), tmp_path / "prior.safetensors")
    parts = tiny_parts("v2" if other == "decoder" else "v1")
    save_bundle(tmp_path / "other.safetensors", {other: parts[other]}, {})
    sources = {"prior": tmp_path / "prior.safetensors", other: tmp_path / "other.safetensors"}
    loaded = WuerstchenPipeline.load(sources, device="cpu").prior
    assert loaded is not None and (loaded.params.feature_scale == 1) == (release == "v1")
    if other == "token_decoder":
        with pytest.raises(ValueError, match="token_decoder .*v1.*prior .*v2"):
            WuerstchenPipeline.load(sources, device="cpu", version="v2")
    else:
        chosen = WuerstchenPipeline.load(sources, device="cpu", version="v2").prior
        assert chosen is not None and chosen.params.feature_scale == 42


@pytest.mark.parametrize("part", ["vqgan", "image_encoder", "prior_text_encoder"])
def test_a_part_of_both_releases_has_no_version(tmp_path: Path, part: str) -> None:
    """Otherwise a converted Stage A would determine the release of a prior that is loaded with it."""
    save_bundle(tmp_path / "part.safetensors", {part: tiny_parts("v1")[part]}, {})
    assert "version" not in read_metadata(tmp_path / "part.safetensors")


def test_inspect_names_the_folder_and_loader_of_a_v1_bundle(bundle: Path) -> None:
    parts = {part.name: part for part in describe(bundle).parts}
    assert {part.folder for part in parts.values()} == {"checkpoints"}
    assert parts["token_decoder"].node == "Würstchen Token Decoder Loader"
