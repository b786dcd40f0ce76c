"""The pipeline as a notebook uses it: what it shows, moving and saving it, progress, and names of arguments."""

from __future__ import annotations

import builtins
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.cli_runs import PROMPT, pixels
from helpers.lora_forms import FORMS, attention_of_prior, random_factors
from helpers.tiny_model import METADATA, tiny_parts, write_tiny_bundle
from PIL import Image
from safetensors.torch import save_file

from wuerstchen_core import WuerstchenPipeline
from wuerstchen_core.checkpoints import PARTS_OF, describe, read_part, save_bundle
from wuerstchen_core.inference.arguments import ALIASES

RED = Image.new("RGB", (64, 64), "red")
METHODS: dict[str, Callable[..., Any]] = {
    "generate": lambda pipe, **named: pipe.generate(PROMPT, **named),
    "reconstruct": lambda pipe, **named: pipe.reconstruct(RED, **named),
    "variations": lambda pipe, **named: pipe.variations(RED, **named),
    "inpaint": lambda pipe, **named: pipe.inpaint(RED, RED, PROMPT, **named),
    "outpaint": lambda pipe, **named: pipe.outpaint(RED, PROMPT, left=64, **named),
    "interpolate": lambda pipe, **named: pipe.interpolate(PROMPT, RED, **named),
}


@pytest.fixture(scope="module")
def pipe(bundle: Path) -> WuerstchenPipeline:
    return WuerstchenPipeline.load(bundle, device="cpu", dtype="fp32")


@pytest.fixture
def fresh(bundle: Path) -> WuerstchenPipeline:
    """A pipeline that the test may change."""
    return WuerstchenPipeline.load(bundle, device="cpu", dtype="fp32")


def states(pipe: WuerstchenPipeline) -> dict[str, torch.Tensor]:
    """Returns all weights."""
    return {f"{name}.{key}": x for name in PARTS_OF["v2"] for key, x in getattr(pipe, name).state_dict().items()}


# the object


def test_repr_names_model_parts_dtype_and_device(fresh: WuerstchenPipeline) -> None:
    shown = repr(fresh)
    for fact in ("tiny.safetensors", "v2", "prior", "decoder", "vqgan", "image_encoder", "float32", "cpu"):
        assert fact in shown
    assert str(Path.cwd()) not in shown and shown.count("\n") == 5
    assert "float16" in repr(fresh.to(torch.float16))
    assert "without" in repr(WuerstchenPipeline()) and "v1" in repr(WuerstchenPipeline(**tiny_parts("v1")))


def test_to_converts_all_but_the_image_encoder(fresh: WuerstchenPipeline) -> None:
    assert fresh.to("bf16") is fresh and fresh.dtype == torch.bfloat16
    assert next(fresh.image_encoder.parameters()).dtype == torch.float32
    assert np.isfinite(pixels(fresh.generate(PROMPT))).all()
    assert fresh.to("cpu", torch.float32).to(device="cpu").to(dtype="fp16").dtype == torch.float16
    assert fresh.device == torch.device("cpu") and fresh.prior_text_encoder is fresh.decoder_text_encoder


def test_a_model_converted_later_equals_one_loaded_so(fresh: WuerstchenPipeline, bundle: Path) -> None:
    loaded = states(WuerstchenPipeline.load(bundle, device="cpu", dtype="bf16"))
    converted = states(fresh.to(torch.bfloat16))
    assert all(x.dtype == converted[key].dtype and x.equal(converted[key]) for key, x in loaded.items())


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("abacus",), {}), ((torch.int16,), {}), (("fp8",), {}), ((3.5,), {}), ((None, "cuda:99"), {}),
        ((), {"dtype": "int4"}), ((), {"device": "tpu"}), ((), {"torch_dtype": "fp16"}),
    ],
    ids=str,
)  # fmt: skip
def test_to_refuses_other_targets(pipe: WuerstchenPipeline, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
    before = states(pipe)
    with pytest.raises(ValueError):
        pipe.to(*arguments, **named)
    assert all(x is before[key] or x.equal(before[key]) for key, x in states(pipe).items())


@pytest.mark.parametrize("name", ["saved.safetensors", "saved"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_saved_model_is_the_same_when_loaded(bundle: Path, tmp_path: Path, name: str, dtype: str) -> None:
    pipe = WuerstchenPipeline.load(bundle, device="cpu", dtype=dtype)
    for _ in range(2):  # a notebook runs a cell again
        pipe.save(tmp_path / name)
    again = WuerstchenPipeline.load(tmp_path / name, device="cpu", dtype=dtype)
    assert all(x.equal(states(again)[key]) and x.dtype == states(again)[key].dtype for key, x in states(pipe).items())
    assert again.sampling == pipe.sampling and again.prior_text_encoder is again.decoder_text_encoder
    assert {key: again.metadata[key] for key in METADATA} == METADATA
    assert np.array_equal(pixels(again.generate(PROMPT)), pixels(pipe.generate(PROMPT)))


def test_save_refuses_other_endings(pipe: WuerstchenPipeline, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.ckpt"):
        pipe.save(tmp_path / "model.ckpt")
    assert not list(tmp_path.iterdir())


# names of arguments


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("num_inference_steps", "prior_steps or decoder_steps"), ("guidance_scale", "prior_guidance"),
        ("prior_guidance_scale", "prior_guidance"), ("generator", "seed"), ("callback_on_step_end", "callback"),
        ("decoder_stepz", "decoder_steps"), ("sampler_name", "sampler"), ("xyz", "prior_steps"),
    ],
)  # fmt: skip
def test_other_names_are_answered_with_ours(pipe: WuerstchenPipeline, method: str, name: str, ours: str) -> None:
    with pytest.raises(ValueError, match=f"{method} .*'{name}'.*{ours}") as error:
        METHODS[method](pipe, **{name: 1})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["negative_prompt", "num_images_per_prompt"])
def test_a_name_is_suggested_only_where_we_have_it(pipe: WuerstchenPipeline, name: str) -> None:
    [ours] = ALIASES[name]
    with pytest.raises(ValueError, match=f"use {ours}$"):
        pipe.variations(RED, **{name: 1})
    with pytest.raises(ValueError, match="choose from") as error:
        pipe.reconstruct(RED, **{name: 1})
    assert ours not in str(error.value).split()


@pytest.mark.parametrize(
    ("name", "ours"), [("torch_dtype", "dtype"), ("vae", "vqgan"), ("priors", "prior"), ("device_map", "device")]
)
def test_load_answers_other_names(name: str, ours: str) -> None:
    with pytest.raises(ValueError, match=f"load .*'{name}'.*use {ours}$"):
        WuerstchenPipeline.load("demo", **{name: "x"})


def test_one_or_several_loras(bundle: Path, tmp_path: Path) -> None:
    state = FORMS["kohya"].write(random_factors(attention_of_prior()), {})
    files = [tmp_path / f"{name}.safetensors" for name in "ab"]
    for file in files:
        save_file(state, file)
    for lora, names in ((files[0], ["a"]), (files, ["a", "b"]), (str(files[1]), ["b"]), ([], [])):
        assert list(WuerstchenPipeline.load(bundle, device="cpu", lora=lora).loras) == names
    for wrong in (3, [3], [None]):
        with pytest.raises(ValueError, match="cannot be used"):
            WuerstchenPipeline.load(bundle, device="cpu", lora=wrong)


@pytest.mark.parametrize("wrong", [3, None, b"x.safetensors", ["x.safetensors"]])
def test_sources_that_are_no_paths(pipe: WuerstchenPipeline, wrong: Any) -> None:
    calls: list[Callable[[], Any]] = [lambda: WuerstchenPipeline.load(wrong), lambda: pipe.save(wrong)]
    if wrong is not None:
        calls.append(lambda: WuerstchenPipeline.load("demo", prior=wrong))
    for call in calls:
        with pytest.raises(ValueError, match="path"):
            call()


@pytest.mark.parametrize("call", ["reconstruct", "load_embeddings"])
@pytest.mark.parametrize("wrong", [3, None])
def test_files_that_are_no_files(pipe: WuerstchenPipeline, call: str, wrong: Any) -> None:
    with pytest.raises(ValueError, match="cannot be used"):
        getattr(pipe, call)(wrong)


@pytest.mark.parametrize(("name", "ours"), [("save_directory", "path"), ("filename", "path"), ("dtype", "path")])
def test_save_answers_other_names(pipe: WuerstchenPipeline, name: str, ours: str) -> None:
    with pytest.raises(ValueError, match=f"save .*'{name}'.*{ours}$"):
        pipe.save(**{name: "x"})


def test_calling_the_pipeline_generates(pipe: WuerstchenPipeline) -> None:
    assert np.array_equal(pixels(pipe(PROMPT, seed=3)), pixels(pipe.generate(PROMPT, seed=3)))


# progress


@pytest.mark.parametrize("method", METHODS)
def test_a_bar_shows_the_steps_and_the_callback_is_called(
    pipe: WuerstchenPipeline, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    seen: list[tuple[str, int, int]] = []
    METHODS[method](pipe, progress=True, callback=lambda *event: seen.append(event[:3]))
    shown = capsys.readouterr().err
    assert "Stage B" in shown and "2/2" in shown and ("decoder", 2, 2) in seen
    assert ("Stage C" in shown) == (method != "reconstruct")


def test_who_gets_a_bar(bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pipe = WuerstchenPipeline.load(bundle, device="cpu")

    def bar(**named: Any) -> bool:
        pipe.generate(PROMPT, **named)
        return bool(capsys.readouterr().err)

    assert not bar()  # stderr is not a terminal
    assert bar(progress=True)
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)  # as in a notebook
    assert bar() and not bar(progress=False)
    pipe.progress = False
    assert not bar() and bar(progress=True)
    assert WuerstchenPipeline.load(bundle, device="cpu", progress=True).progress is True
    monkeypatch.setattr(sys, "stderr", None)  # pythonw
    pipe.progress = None
    pipe.generate(PROMPT)


def test_without_tqdm_there_is_no_bar(
    pipe: WuerstchenPipeline, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.partition(".")[0] == "tqdm":
            raise ImportError(name)
        return original(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    assert pipe.generate(PROMPT, progress=True) and capsys.readouterr().err == ""


def test_wrong_arguments_draw_no_bar(pipe: WuerstchenPipeline, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError):
        pipe.generate(PROMPT, progress=True, prior_steps=0)
    assert capsys.readouterr().err == ""


# parts of a base


@pytest.fixture(scope="module")
def own_prior(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prior with settings and words of its own."""
    path = tmp_path_factory.mktemp("own") / "own.safetensors"
    prior = tiny_parts()["prior"]
    with torch.no_grad():
        next(prior.parameters()).add_(0.5)
    sampling = {**METADATA["sampling"], "prior_steps": 2, "width": 64}
    spec = {"title": "Own", "trigger_words": ["ownish"]}
    save_bundle(path, {"prior": prior}, {"sampling": sampling, "vocabulary": {"words": ["own"]}, "modelspec": spec})
    return path


def test_a_replaced_prior_brings_its_settings_and_words(bundle: Path, own_prior: Path, tmp_path: Path) -> None:
    pipe = WuerstchenPipeline.load(bundle, prior=own_prior, device="cpu", dtype="fp32")
    expected = read_part(own_prior, "prior").state_dict
    assert all(x.equal(expected[key]) for key, x in pipe.prior.state_dict().items())
    assert (pipe.sampling.prior_steps, pipe.sampling.width, pipe.sampling.height) == (2, 64, 64)
    assert pipe.metadata["vocabulary"] == {"words": ["own"]} and pipe.metadata["licence"] == METADATA["licence"]
    pipe.save(tmp_path / "whole.safetensors")
    whole = WuerstchenPipeline.load(tmp_path / "whole.safetensors", device="cpu", dtype="fp32")
    assert (describe(tmp_path / "whole.safetensors").title, whole.metadata["modelspec"]["trigger_words"]) == (
        "Own",
        ["ownish"],
    )
    assert np.array_equal(pixels(whole.generate(PROMPT)), pixels(pipe.generate(PROMPT)))


def test_settings_that_a_replaced_prior_does_not_name_stay_the_bases(bundle: Path, tmp_path: Path) -> None:
    base = write_tiny_bundle(
        tmp_path / "fast.safetensors", {"sampling": {"width": 64, "height": 64, "schedule": "fast"}}
    )
    save_bundle(tmp_path / "own.safetensors", {"prior": read_part(bundle, "prior")}, {"sampling": {"prior_steps": 2}})
    sampling = WuerstchenPipeline.load(base, prior=tmp_path / "own.safetensors", device="cpu").sampling
    assert (sampling.width, sampling.height, sampling.schedule, sampling.prior_steps) == (64, 64, "linear", 2)


def test_a_replaced_decoder_brings_the_settings_of_its_stage_only(bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "decoder.safetensors"
    sampling = {"prior_steps": 9, "width": 1024, "decoder_steps": 4, "decoder_guidance": 1.5}
    save_bundle(file, {"decoder": read_part(bundle, "decoder")}, {"sampling": sampling, "vocabulary": {"words": ["x"]}})
    base, pipe = (WuerstchenPipeline.load(bundle, device="cpu", **parts) for parts in ({}, {"decoder": file}))
    assert pipe.sampling == base.sampling.updated(decoder_steps=4, decoder_guidance=1.5)
    assert pipe.metadata["vocabulary"] == METADATA["vocabulary"]


def test_one_file_replaces_both_text_encoders(bundle: Path, tmp_path: Path) -> None:
    tower = tiny_parts()["prior_text_encoder"]
    with torch.no_grad():
        next(tower.parameters()).add_(0.5)
    save_bundle(tmp_path / "text.safetensors", {"text_encoder": tower}, {})
    expected = tower.state_dict()
    for source in (bundle, {"prior": bundle, "decoder": bundle}):
        pipe = WuerstchenPipeline.load(source, text_encoder=tmp_path / "text.safetensors", device="cpu", dtype="fp32")
        assert pipe.prior_text_encoder is pipe.decoder_text_encoder
        assert all(x.equal(expected[key]) for key, x in pipe.prior_text_encoder.state_dict().items())
    pipe = WuerstchenPipeline.load(bundle, prior_text_encoder=tmp_path / "text.safetensors", device="cpu")
    assert pipe.prior_text_encoder is not pipe.decoder_text_encoder


def test_parts_of_another_release_are_refused(bundle: Path, tmp_path: Path) -> None:
    v1 = write_tiny_bundle(tmp_path / "v1.safetensors", release="v1")
    for part in ("prior", "token_decoder"):
        with pytest.raises(ValueError, match="v1.*v2"):
            WuerstchenPipeline.load(bundle, device="cpu", **{part: v1})
    with pytest.raises(ValueError, match="no text_encoder"):
        save_bundle(tmp_path / "a.safetensors", {"vqgan": read_part(bundle, "vqgan")}, {})
        WuerstchenPipeline.load(bundle, text_encoder=tmp_path / "a.safetensors")
