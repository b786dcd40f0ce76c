"""The pipeline: its promises on a tiny random model, its numbers on the golden chain."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_data import Golden, assert_near
from networks import DECODER, PRIOR, TEXT, VQ
from PIL import Image
from test_diffusion_samplers import replay
from tiny_model import METADATA, write_tiny_bundle
from torch import Tensor

from wuerstchen_core import WuerstchenPipeline, devices, stages
from wuerstchen_core.checkpoints import PARTS_OF, demo_path, read_part, save_bundle
from wuerstchen_core.devices import pick_dtype
from wuerstchen_core.diffusion.samplers import NoiseSource
from wuerstchen_core.models.decoder import Decoder, DecoderParams
from wuerstchen_core.models.prior import Prior, PriorParams
from wuerstchen_core.models.text_encoder import TextEncoder
from wuerstchen_core.models.vqgan import VQGAN, VQGANParams
from wuerstchen_core.pictures import legal_size, open_picture
from wuerstchen_core.sampling import Sampling

PROMPT = "a red apple"
ROUNDING = 1  # of 255: where in memory a tensor lies, and how many share a batch, moves fp32 in its last digit


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bundle(tmp_path_factory.mktemp("model") / "tiny.safetensors")


@pytest.fixture(scope="module")
def pipe(bundle: Path) -> WuerstchenPipeline:
    return WuerstchenPipeline.load(bundle, device="cpu", dtype="fp32")


def pixels(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image).astype(int) for image in images])


def latents(pipe: WuerstchenPipeline, prompts: list[str], seed: int) -> tuple[Tensor, Tensor]:
    """What Stages C and B make of prompts."""
    prior_text, decoder_text = pipe.encode_text(prompts)
    features = pipe.sample_prior(prior_text, pipe.sampling, seed=seed)
    return features, pipe.sample_decoder(features, decoder_text, pipe.sampling, seed=seed)


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
    sampling = Sampling(width=width, height=height)  # the published defaults
    monkeypatch.setattr(stages, "seeded_noise", noise_of("prior"))
    features = pipe.sample_prior(golden["in/c_prior"], sampling, negative=golden["in/c_prior_uncond"])
    assert_near(features, golden["out/image_embeddings"], 5e-4)  # observed 5e-5
    monkeypatch.setattr(stages, "seeded_noise", noise_of("decoder"))
    made = pipe.sample_decoder(features, golden["in/clip_decoder"], sampling)
    assert_near(made / 0.3764, golden["out/decoder_preds"][-1], 2e-4)  # observed 2e-5
    expected = golden["out/image"].clamp(0, 1).permute(0, 2, 3, 1).numpy() * 255
    assert np.abs(pixels(pipe.decode(made)) - expected).max() < 0.51  # rounding, and 1e-5 * 255


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


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 2},
        {"negative": "blue"},
        {"prior_guidance": 4.0},
        {"prior_steps": 4},
        {"schedule": "diffusers"},
        {"decoder_steps": 3},
        {"decoder_guidance": 3.0},
        {"decoder_guidance": 3.0, "negative": "blue", "prior_guidance": 1.0},
    ],
    ids=str,
)
def test_what_changes_the_picture(pipe: WuerstchenPipeline, change: dict[str, Any]) -> None:
    assert np.abs(pixels(pipe.generate(PROMPT)) - pixels(pipe.generate(PROMPT, **change))).max() > ROUNDING


def test_no_guidance_means_no_negative_prompt(pipe: WuerstchenPipeline) -> None:
    plain = pixels(pipe.generate(PROMPT, prior_guidance=1.0))
    assert np.abs(plain - pixels(pipe.generate(PROMPT, prior_guidance=0.0, negative="blue"))).max() <= ROUNDING


def test_guidance_of_the_decoder_leads_away_from_no_features(pipe: WuerstchenPipeline) -> None:
    """With the prompt itself as the negative one, features are all that the two halves differ in."""
    [features, plain], (_, text) = latents(pipe, [PROMPT], seed=0), pipe.encode_text([PROMPT])
    guided = pipe.sampling.changed(decoder_guidance=3.0)
    made = pipe.sample_decoder(features, text, guided, negative=text)
    assert float((made - plain).std() / plain.std()) > 0.01


# text


def test_text_of_any_length_is_read_whole(pipe: WuerstchenPipeline) -> None:
    """The states of a long prompt are those of its pieces of 75 tokens; "a" is one of them."""
    words = ["a"] * 80 + ["small"] * 80
    [states], _ = pipe.encode_text([" ".join(words)])
    pieces, _ = pipe.encode_text([" ".join(words[i : i + 75]) for i in range(0, 160, 75)])
    assert_near(states, pieces.flatten(0, 1), 1e-5)
    full, more = (pipe.encode_text([" ".join(words[:n])])[0] for n in (75, 76))
    assert full.shape[1] == 77 and more.shape[1] == 154


def test_texts_of_different_lengths_paint_as_they_do_alone(pipe: WuerstchenPipeline) -> None:
    long = "a red apple on " * 30
    images = pixels(pipe.generate([PROMPT, long, PROMPT], seed=3, negative="blue " * 80))
    for i, prompt in enumerate([PROMPT, long, PROMPT]):
        [alone] = pixels(pipe.generate(prompt, seed=3 + i, negative="blue " * 80))
        assert np.abs(images[i] - alone).max() <= ROUNDING
    cut = pixels(pipe.generate(long[: 15 * 15], seed=4, negative="blue " * 80))[0]
    assert np.abs(images[1] - cut).max() > ROUNDING
    with pytest.raises(ValueError, match="encode them one by one"):
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
        ({"width": 100}, "nearest legal size is 128x64"),
        ({"width": 4096, "height": 256}, "nearest legal size is 2048x256"),
        ({"height": 0}, "nearest legal size is 128x64"),
        ({"prior_steps": 0}, "at least 1 is needed"),
        ({"decoder_steps": 0}, "at least 1 is needed"),
        ({"schedule": "cosine"}, "choose original, diffusers or linear"),
        ({"schedule": "original", "prior_steps": 12}, "has 30 steps, not 12"),
        ({"prior_guidance": float("nan")}, "a guidance of nan cannot be used"),
        ({"seed": -1}, "choose a number from 0 to"),
        ({"seed": 2**63 - 1}, "choose a number from 0 to"),
        ({"count": 0}, "count of at least 1"),
        ({"prompt": []}, "at least one prompt"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_what_cannot_be_painted_is_refused_before_any_work(
    pipe: WuerstchenPipeline, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(WuerstchenPipeline, "encode_text", lambda *args: pytest.fail("work was begun"))
    with pytest.raises(ValueError, match=message):
        pipe.generate(**{"prompt": PROMPT, **options})


def test_defaults_are_the_published_ones() -> None:
    assert Sampling.of({}) == Sampling(1024, 1024, "original", 30, 4.0, 12, 1.0)
    assert Sampling.of(METADATA) == Sampling(128, 64, "linear", 3, 2.0, 2, 1.0)
    assert Sampling.of(METADATA).changed(schedule="diffusers").prior_steps == 29
    assert Sampling().changed(prior_steps=8).schedule == "linear"


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
    features, made = latents(pipe, [PROMPT], seed=0)
    # After the last step what is left of the noise is 1 % (alpha_bar ends at 0.9999), in the units of each stage.
    assert float((last["prior"] - features).std() / features.std()) < 0.1
    assert float((last["decoder"] - made).std() / made.std()) < 0.1


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


def test_unknown_words_are_named_with_what_can_be_painted(
    pipe: WuerstchenPipeline, caplog: pytest.LogCaptureFixture
) -> None:
    pipe.generate("a red Zebra on a blue castle", negative="fog")
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    line = record.getMessage()
    assert "\n" not in line and "never learned 'zebra', 'castle', 'fog'" in line
    assert all(known in line for known in ("red apple", "blue", "large, small"))


def test_known_words_are_not_warned_of(pipe: WuerstchenPipeline, caplog: pytest.LogCaptureFixture) -> None:
    pipe.generate("A small red apple, on blue.")
    assert not caplog.records


def test_a_model_without_a_vocabulary_never_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_tiny_bundle(tmp_path / "free.safetensors", {"sampling": METADATA["sampling"]})
    WuerstchenPipeline.load(path, device="cpu").generate("a zebra")
    assert not caplog.records


# sources


def test_one_tower_is_loaded_once(pipe: WuerstchenPipeline) -> None:
    assert pipe.prior_text_encoder is pipe.decoder_text_encoder
    assert not any(p.requires_grad for name in PARTS_OF["v2"] for p in getattr(pipe, name).parameters())


def test_files_by_part(pipe: WuerstchenPipeline, bundle: Path, tmp_path: Path) -> None:
    sources = {}
    for name in PARTS_OF["v2"]:
        sources[name] = tmp_path / f"{name}.safetensors"
        save_bundle(sources[name], {name: read_part(bundle, name)}, METADATA if name == "prior" else {})
    loaded = WuerstchenPipeline.load(sources, device="cpu", dtype="fp32")
    assert np.abs(pixels(loaded.generate(PROMPT)) - pixels(pipe.generate(PROMPT))).max() <= ROUNDING


def test_a_model_without_its_prior_still_reconstructs(tmp_path: Path) -> None:
    path = write_tiny_bundle(tmp_path / "half.safetensors", without=("prior",))
    half = WuerstchenPipeline.load(path, device="cpu")
    with pytest.raises(ValueError, match="this model has no prior, which is needed here"):
        half.generate(PROMPT)
    assert half.reconstruct(Image.new("RGB", (64, 64), "red"))[0].size == (64, 64)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("nowhere.safetensors", {}, "nowhere.safetensors does not exist"),
        ({}, {}, "no file was given: name at least one of prior, decoder"),
        ({"unet": "x"}, {}, "'unet' is no part of a model: the parts are prior"),
        (None, {"dtype": "int8"}, "dtype 'int8' is unknown: choose auto, fp32, bf16, fp16"),
        (None, {"dtype": torch.int8}, "dtype 'torch.int8' is unknown"),
        (None, {"device": "abacus"}, "device 'abacus' is unknown: choose auto, .*cpu"),
        (None, {"device": "vulkan"}, "device 'vulkan' is not on this machine: choose auto, .*cpu"),
        (None, {"device": "cuda:99"}, "device 'cuda:99' is not on this machine: choose auto, .*cpu"),
    ],
    ids=str,
)
def test_what_cannot_be_loaded(bundle: Path, source: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WuerstchenPipeline.load(bundle if source is None else source, **options)


def test_a_tower_of_another_width_is_named(bundle: Path, tmp_path: Path) -> None:
    save_bundle(tmp_path / "wide.safetensors", {"text_encoder": TextEncoder(replace(TEXT, width=64))}, {})
    sources = {"prior": bundle, "prior_text_encoder": tmp_path / "wide.safetensors"}
    with pytest.raises(ValueError, match="the prior reads .* a tower 32 wide, but its text encoder is a tower 64 wide"):
        WuerstchenPipeline.load(sources, device="cpu")


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"sampling": [1]}, "damaged \\(sampling is no JSON object\\)"),
        ({"vocabulary": ["a"]}, "damaged \\(vocabulary is no JSON object\\)"),
        ({"sampling": {"width": None}}, "unusable sampling defaults .*'width': None"),
        ({"sampling": {"decoder_steps": "many"}}, "unusable sampling defaults .*'decoder_steps': 'many'"),
    ],
    ids=str,
)
def test_metadata_that_does_not_fit(tmp_path: Path, metadata: dict[str, Any], message: str) -> None:
    save_bundle(tmp_path / "odd.safetensors", {"vqgan": VQGAN(VQ)}, metadata)
    with pytest.raises(ValueError, match=message):
        WuerstchenPipeline.load(tmp_path / "odd.safetensors", device="cpu")


def test_a_pipeline_without_networks_says_so() -> None:
    with pytest.raises(ValueError, match="this model has no network"):
        _ = WuerstchenPipeline().device


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there(bundle: Path) -> None:
    with pytest.raises(ValueError, match="device 'cuda' is not on this machine: choose auto, "):
        WuerstchenPipeline.load(bundle, device="cuda")


def diffusers_folder(folder: Path) -> Path:
    """diffusers' own save of a combined pipeline, tiny, each tower of its own width."""
    from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel, WuerstchenDiffNeXt, WuerstchenPrior
    from transformers import CLIPTextConfig, CLIPTextModel

    def tower(width: int) -> CLIPTextModel:
        return CLIPTextModel(
            CLIPTextConfig(
                hidden_size=width,
                intermediate_size=4 * width,
                num_hidden_layers=TEXT.layers,
                num_attention_heads=2,
                hidden_act="gelu",
                eos_token_id=49407,
            )
        )

    torch.manual_seed(0)
    components = {
        "prior_prior": WuerstchenPrior(
            c_in=16, c=PRIOR.c, c_cond=PRIOR.c_cond, c_r=64, depth=PRIOR.depth, nhead=PRIOR.nhead
        ),
        "decoder": WuerstchenDiffNeXt(
            c_cond=DECODER.c_cond,
            c_hidden=list(DECODER.c_hidden),
            nhead=list(DECODER.nhead),
            blocks=list(DECODER.blocks),
            level_config=["CT", "CTA", "CTA"],
            inject_effnet=list(DECODER.inject_effnet),
            clip_embd=DECODER.clip_embd,
            dropout=[0.0] * 3,
        ),
        "vqgan": PaellaVQModel(
            levels=VQ.levels,
            bottleneck_blocks=VQ.bottleneck_blocks,
            embed_dim=VQ.c_hidden,
            latent_channels=4,
            num_vq_embeddings=VQ.codebook_size,
        ),
        "prior_text_encoder": tower(PRIOR.c_cond),
        "text_encoder": tower(DECODER.clip_embd),
    }
    for name, network in components.items():
        network.save_pretrained(folder / name)
    return folder


def test_a_diffusers_folder_paints(tmp_path: Path) -> None:
    folder = diffusers_folder(tmp_path / "folder")
    loaded = WuerstchenPipeline.load(folder, device="cpu", dtype="fp32")
    assert loaded.sampling == Sampling() and loaded.image_encoder is None
    assert loaded.prior_text_encoder is not loaded.decoder_text_encoder
    options: dict[str, Any] = {"width": 128, "height": 64, "prior_steps": 2, "decoder_steps": 2}
    images = loaded.generate(PROMPT, **options)
    assert images[0].size == (128, 64)
    with pytest.raises(ValueError, match="this model has no image encoder"):
        loaded.encode(images[0])

    parts = {name: read_part(folder, name) for name in PARTS_OF["v2"] if name != "image_encoder"}
    save_bundle(tmp_path / "same.safetensors", parts, {})
    same = WuerstchenPipeline.load(tmp_path / "same.safetensors", device="cpu", dtype="fp32")
    assert np.abs(pixels(same.generate(PROMPT, **options)) - pixels(images)).max() <= ROUNDING


# precision


def test_bf16_paints_and_leaves_the_pixels_to_fp32(bundle: Path, pipe: WuerstchenPipeline) -> None:
    half = WuerstchenPipeline.load(bundle, device="cpu", dtype="bf16")
    kinds = {name: next(getattr(half, name).parameters()).dtype for name in PARTS_OF["v2"]}
    fp32 = {name for name, dtype in kinds.items() if dtype == torch.float32}
    assert fp32 == {"vqgan", "image_encoder"} and set(kinds.values()) == {torch.float32, torch.bfloat16}
    features, made = latents(half, [PROMPT], seed=0)
    assert features.dtype == made.dtype == torch.float32 and made.isfinite().all()
    exact, _ = latents(pipe, [PROMPT], seed=0)
    assert 0 < float((features - exact).std() / exact.std()) < 0.2


@pytest.mark.parametrize(
    ("native", "parameters", "expected"),
    [(True, 10**9, torch.bfloat16), (True, 10**7, torch.float32), (False, 10**9, torch.float32)],
)
def test_auto_dtype(monkeypatch: pytest.MonkeyPatch, native: bool, parameters: int, expected: torch.dtype) -> None:
    monkeypatch.setattr(devices, "native_bf16", lambda device: native)
    assert pick_dtype("auto", torch.device("cpu"), parameters) == expected


# pictures in


def test_encode_covers_and_crops(pipe: WuerstchenPipeline, tmp_path: Path) -> None:
    banner = Image.new("RGB", (300, 100), "red")
    banner.paste("blue", (100, 0, 200, 100))
    banner.save(tmp_path / "banner.png")
    square = pipe.encode(tmp_path / "banner.png", width=64, height=64)  # the middle third
    assert_near(square, pipe.encode(Image.new("RGB", (64, 64), "blue")), 1e-4)
    assert tuple(pipe.encode(banner).shape) == (1, 16, 3, 8)  # 320x128
    with pytest.raises(ValueError, match="nearest legal size is 64x64"):
        pipe.encode(banner, width=70, height=64)


def test_a_large_picture_keeps_its_proportions() -> None:
    assert legal_size(4096, 1024) == (2048, 512)
    assert legal_size(30, 100) == (64, 128)


def test_transparency_is_white_and_exif_turns(tmp_path: Path) -> None:
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert open_picture(clear).getpixel((0, 0)) == (255, 255, 255)
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (8, 4), "red").save(tmp_path / "turned.jpg", exif=turned)
    assert open_picture(tmp_path / "turned.jpg").size == (4, 8)


def test_reconstruct(pipe: WuerstchenPipeline) -> None:
    picture = Image.new("RGB", (128, 64), "green")
    [one], [same], [other] = (pipe.reconstruct(picture, seed=seed) for seed in (1, 1, 2))
    assert one.size == (128, 64)
    assert np.abs(pixels([one]) - pixels([same])).max() <= ROUNDING < np.abs(pixels([one]) - pixels([other])).max()


# the shipped model


@pytest.mark.skipif(not demo_path().is_file(), reason="the shipped model is not trained yet")
def test_the_shipped_model_paints_what_was_asked() -> None:
    from wuerstchen_core.demo.judge import Judge
    from wuerstchen_core.demo.vocabulary import COLOURS, SIZES, THINGS

    demo = WuerstchenPipeline.load("demo", device="cpu")
    [image] = demo.generate("a red apple on a blue background", width=256, height=256, seed=1)
    judge, blue = Judge(), list(COLOURS).index("blue")
    assert judge.background(np.asarray(image)) == blue
    shown = judge.identify(np.asarray(image), blue, list(SIZES).index("large"))
    assert THINGS[shown].name == "red apple"
    assert demo.sampling.width == demo.sampling.height == 256
