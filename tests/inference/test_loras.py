"""Tests LoRAs that are loaded, changed and taken off without loading the model again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.lora_forms import FORMS, attention_of_prior, attention_of_tower, random_factors
from helpers.networks import TEXT
from helpers.tiny_model import write_tiny_bundle
from safetensors.torch import save_file
from torch import Tensor

from wuerstchen_core import WuerstchenPipeline
from wuerstchen_core.checkpoints import PARTS

DIFFUSERS = FORMS["diffusers"]
TURBO = {"schedule": "turbo", "sampler": "ddim", "prior_guidance": 1.0}
SETTINGS: dict[str, Any] = {  # of LoRAs for few steps
    "two": {**TURBO, "prior_steps": 2},
    "four": {**TURBO, "prior_steps": 4},
    "one": {"decoder_steps": 1},
    "later": {"schedule": "of a later version"},
    "other": {**TURBO, "width": 64},
    "damaged": "{",
}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bundle(tmp_path_factory.mktemp("loras") / "tiny.safetensors")


@pytest.fixture(scope="module")
def files(bundle: Path) -> dict[str, Path]:
    network, text = random_factors(attention_of_prior()), random_factors(attention_of_tower(TEXT.width), seed=1)
    prefix = "text_encoders.clip_h.transformer.text_model"
    states = {
        "both": DIFFUSERS.write(network, text),
        "prior": DIFFUSERS.write(random_factors(attention_of_prior(), seed=2), {}),
        "words_b": {f"{prefix}.final_layer_norm.diff_b": torch.ones(TEXT.width)},
        "stage_b": {"prior.clf.1.diff_b": torch.ones(32)},
        "wide": DIFFUSERS.write(random_factors(attention_of_prior(128)), {}),
    }
    headers: dict[str, str] = {}
    for name, settings in SETTINGS.items():
        states[name] = states["stage_b" if name == "one" else "prior"]
        headers[name] = settings if isinstance(settings, str) else json.dumps(settings)
    paths = {name: bundle.with_name(f"{name}.safetensors") for name in states}
    for name, state in states.items():
        header = {"distillation": "{}", "sampling": headers[name]} if name in headers else None
        save_file(state, paths[name], header)
    return paths


def load(bundle: Path, dtype: str = "fp32", **options: Any) -> WuerstchenPipeline:
    return WuerstchenPipeline.load(bundle, device="cpu", dtype=dtype, **options)


def weights(pipe: WuerstchenPipeline) -> dict[str, Tensor]:
    networks = ((part, getattr(pipe, part, None)) for part in PARTS)
    return {
        f"{part}.{key}": x.clone() for part, network in networks if network for key, x in network.state_dict().items()
    }


def changed(one: dict[str, Tensor], other: dict[str, Tensor]) -> set[str]:
    """Returns the parts whose weights differ in a bit."""
    assert one.keys() == other.keys()
    return {key.partition(".")[0] for key, x in one.items() if not torch.equal(x, other[key])}


@pytest.mark.parametrize("dtype", ["fp32", "int8"])
def test_taking_off_restores_every_bit(bundle: Path, files: dict[str, Path], dtype: str) -> None:
    pipe = load(bundle, dtype)
    before, towers = weights(pipe), (pipe.prior_text_encoder, pipe.decoder_text_encoder)
    pipe.load_lora(files["both"], 0.7)
    one = weights(pipe)
    assert changed(one, before) == {"prior", "prior_text_encoder"} and pipe.loras == {"both": 0.7}
    pipe.load_lora(files["words_b"])
    pipe.load_lora(files["stage_b"], 3)
    assert changed(weights(pipe), one) == {"decoder", "decoder_text_encoder"}
    pipe.load_lora(files["prior"], -1.0, name="style")
    assert list(pipe.loras) == ["both", "words_b", "stage_b", "style"]
    for name in ("words_b", "both", "style"):  # in another order
        pipe.unload_lora(name)
    assert changed(weights(pipe), before) == {"decoder"} and pipe.loras == {"stage_b": 3.0}
    pipe.unload_lora()
    assert not changed(weights(pipe), before) and not pipe.loras
    assert (pipe.prior_text_encoder, pipe.decoder_text_encoder) == towers  # one network, encoded once


@pytest.mark.parametrize("dtype", ["fp32", "int8"])
def test_a_changed_strength_equals_loading_with_it(bundle: Path, files: dict[str, Path], dtype: str) -> None:
    pipe = load(bundle, dtype, lora={files["both"]: 2.0, files["prior"]: 1.0})
    pipe.set_lora_strength("both", 0.25)
    assert not changed(weights(pipe), weights(load(bundle, dtype, lora={files["both"]: 0.25, files["prior"]: 1.0})))
    pipe.set_lora_strength("prior", 0)
    assert not changed(weights(pipe), weights(load(bundle, dtype, lora={files["both"]: 0.25})))
    pipe.set_lora_strength("prior", 1)
    pipe.unload_lora("both")
    assert not changed(weights(pipe), weights(load(bundle, dtype, lora=files["prior"])))


@pytest.mark.parametrize("dtype", ["fp32", "int8"])
def test_pictures_are_those_without_it_again(bundle: Path, files: dict[str, Path], dtype: str) -> None:
    pipe = load(bundle, dtype)
    [before] = pipe.generate("a red apple", seed=1)
    pipe.load_lora(files["both"], 4.0)
    [during] = pipe.generate("a red apple", seed=1)
    pipe.unload_lora()
    [after] = pipe.generate("a red apple", seed=1)
    assert before.tobytes() == after.tobytes() != during.tobytes()


@pytest.mark.parametrize(
    ("loaded", "taken_off"),
    [
        (["two", "four"], ["two", "four"]),
        (["two", "four"], ["four", "two"]),
        (["two", "one", "four"], ["two", "one", "four"]),
        (["one", "two"], [None]),
        (["two", "four"], [None]),
        (["two", "two-2"], ["two", "two-2"]),
    ],
)
def test_the_settings_of_distilled_loras(
    loaded: list[str], taken_off: list[str | None], bundle: Path, files: dict[str, Path]
) -> None:
    pipe = load(bundle)
    base = pipe.sampling
    for name in loaded:
        assert pipe.load_lora(files[name.removesuffix("-2")]) == name
    for name in taken_off:
        pipe.unload_lora(name)
        left = [SETTINGS[one.removesuffix("-2")] for one in pipe.loras]
        assert pipe.sampling == replace(base, **{key: x for settings in left for key, x in settings.items()})
    assert pipe.sampling == base and not pipe.loras


def test_settings_that_were_changed_meanwhile_are_kept(bundle: Path, files: dict[str, Path]) -> None:
    pipe = load(bundle, lora=[files["two"], files["one"]])
    base = load(bundle).sampling
    pipe.sampling = pipe.sampling.updated(prior_guidance=2)
    pipe.load_lora(files["four"])
    pipe.unload_lora("two")
    assert pipe.sampling == replace(base, **SETTINGS["four"], **SETTINGS["one"])
    pipe.unload_lora("four")
    assert pipe.sampling == replace(base, prior_guidance=2, **SETTINGS["one"])
    pipe.sampling = pipe.sampling.updated(schedule="turbo", prior_steps=3)
    pipe.unload_lora("one")
    assert pipe.sampling == replace(base, prior_guidance=2, schedule="turbo", sampler="ddim", prior_steps=3)


@pytest.mark.parametrize(("name", "fact"), [("later", "later version"), ("other", "width"), ("damaged", "damaged")])
def test_settings_that_cannot_be_used_are_left_out(
    name: str, fact: str, bundle: Path, files: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    pipe = load(bundle, lora=files[name])
    assert pipe.sampling == load(bundle).sampling and pipe.loras
    [record] = caplog.records
    assert record.levelname == "WARNING" and fact in record.message


def test_errors_change_nothing(bundle: Path, files: dict[str, Path], tmp_path: Path) -> None:
    pipe = load(bundle, lora=files["both"])
    before = weights(pipe)
    calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], str]] = [
        (pipe.load_lora, (files["wide"],), {}, "128x128"),
        (pipe.load_lora, (tmp_path / "none.safetensors",), {}, "none.safetensors"),
        (pipe.load_lora, (files["prior"], float("nan")), {}, "nan"),
        (pipe.load_lora, (files["prior"], "strong"), {}, "strong"),
        (pipe.load_lora, (files["prior"],), {"name": "both"}, "'both'"),
        (pipe.set_lora_strength, ("both", float("inf")), {}, "inf"),
        (pipe.set_lora_strength, ("style", 1.0), {}, "style.*both"),
        (pipe.unload_lora, ("style",), {}, "style.*both"),
        (pipe.load_lora, (None,), {}, "None"),
        (pipe.load_lora, ([files["prior"]],), {}, "file or folder"),
        (pipe.load_lora, (files["prior"],), {"adapter_name": "x"}, "load_lora.*use name"),
        (pipe.load_lora, (files["prior"],), {"scale": 1}, "use strength"),
        (pipe.set_lora_strength, ("both",), {"weight": 1}, "set_lora_strength.*use strength"),
    ]
    for call, arguments, options, fact in calls:
        with pytest.raises(ValueError, match=fact) as error:
            call(*arguments, **options)
        assert "\n" not in str(error.value)
    assert not changed(weights(pipe), before) and pipe.loras == {"both": 1.0}


def test_one_file_can_be_loaded_twice(bundle: Path, files: dict[str, Path]) -> None:
    pipe = load(bundle)
    names = [pipe.load_lora(files["prior"], 0.5) for _ in range(2)]
    once = weights(load(bundle, lora=files["prior"]))
    assert len(set(names)) == 2
    (files["prior"].parent / "style").mkdir()
    file = files["prior"].parent / "style" / "pytorch_lora_weights.safetensors"
    file.write_bytes(files["prior"].read_bytes())
    pipe.unload_lora(pipe.load_lora(file))
    assert pipe.load_lora(file, 0) == "style"
    assert all(torch.allclose(x, once[key], rtol=0, atol=1e-6) for key, x in weights(pipe).items())


def test_a_model_that_was_cast_meanwhile(bundle: Path, files: dict[str, Path]) -> None:
    pipe, plain = load(bundle, lora=files["both"]).to("bf16"), load(bundle).to("bf16")
    pipe.set_lora_strength("both", 0.5)
    assert pipe.dtype == torch.bfloat16 and changed(weights(pipe), weights(plain)) == {"prior", "prior_text_encoder"}
    pipe.unload_lora("both")
    assert not changed(weights(pipe), weights(plain))


@pytest.mark.parametrize(("first", "then"), [("fp32", "int8"), ("int8", "fp32"), ("int8", "bf16")])
def test_a_model_that_became_int8_meanwhile(first: str, then: str, bundle: Path, files: dict[str, Path]) -> None:
    pipe = load(bundle, first, lora={files["both"]: 4.0})
    expected = load(bundle, first).to(then).generate("a red apple", seed=1)[0]
    pipe.to(then)
    with_lora = np.asarray(pipe.generate("a red apple", seed=1)[0], int)
    pipe.unload_lora("both")
    without = np.asarray(pipe.generate("a red apple", seed=1)[0], int)
    assert np.abs(without - np.asarray(expected, int)).max() <= 1 < 3 < np.abs(with_lora - without).max()


def test_a_lora_changes_int8_weights_as_it_changes_exact_ones(bundle: Path, files: dict[str, Path]) -> None:
    """The changed weights are quantised once, from the sum."""
    pipe, exact = load(bundle, "int8", lora=files["both"]), load(bundle, lora=files["both"])
    name = "blocks.2.attention.to_q"
    found = pipe.require("prior").get_submodule(name).weights(torch.empty(()))[0]
    wanted = exact.require("prior").get_parameter(f"{name}.weight")
    change = wanted - load(bundle).require("prior").get_parameter(f"{name}.weight")
    assert (found - wanted).norm() < 0.02 * wanted.norm() < change.norm()
