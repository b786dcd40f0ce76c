"""Arguments of numpy and torch count as Python's, and what is no number is refused before any work."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.cli_runs import pixels
from PIL import Image

from wuerstchen_core import WuerstchenPipeline
from wuerstchen_core.diffusion.samplers import LARGEST_SEED
from wuerstchen_core.models.text_encoder import TextEncoder

PROMPT = "a red apple"
NUMBERS = {
    "seed": 3, "count": 2, "width": 64, "height": 128, "prior_steps": 2, "prior_guidance": 2.0, "decoder_steps": 2,
    "decoder_guidance": 1.5, "decoder_guidance_end": 1.0,
}  # fmt: skip
WRONG = ["3", 2.5, True, float("nan"), [[3]], {}, "", b"1"]


@pytest.fixture(scope="module")
def pipe(bundle: Path) -> WuerstchenPipeline:
    return WuerstchenPipeline.load(bundle, dtype="fp32", device="cpu")


def picture() -> Image.Image:
    return Image.radial_gradient("L").resize((64, 64)).convert("RGB")


@pytest.mark.parametrize("kind", [np.array, torch.tensor, lambda x: np.array(x)[()]], ids=["array", "tensor", "scalar"])
def test_numbers_of_numpy_and_torch_are_pythons(pipe: WuerstchenPipeline, kind: Callable[[Any], Any]) -> None:
    expected = pixels(pipe.generate(PROMPT, **NUMBERS))
    found = pixels(pipe.generate(PROMPT, **{name: kind(value) for name, value in NUMBERS.items()}))
    assert (found == expected).all()
    assert (pixels(pipe.generate(PROMPT, **{**NUMBERS, "seed": kind([3, 4])})) == expected).all()


@pytest.mark.parametrize("kind", [np.array, torch.tensor], ids=["numpy", "torch"])
def test_edits_take_them_too(pipe: WuerstchenPipeline, kind: Callable[[Any], Any]) -> None:
    for call in (
        lambda of: pipe.reconstruct(picture(), seed=of(3), width=of(64), height=of(64)),
        lambda of: pipe.variations(picture(), PROMPT, strength=of(0.5), seed=of(3), count=of(2)),
        lambda of: pipe.outpaint(picture(), PROMPT, left=of(64), seed=of(3)),
        lambda of: pipe.interpolate(PROMPT, picture(), steps=of(2), seed=of(3)),
        lambda of: pipe.interpolate(PROMPT, "a cat", fractions=of([0.5]), seed=of(3)),
    ):
        assert (pixels(call(kind)) == pixels(call(lambda value: value))).all()


def test_stages_take_them_too(pipe: WuerstchenPipeline) -> None:
    text, _ = pipe.encode_text([PROMPT])
    sampling = pipe.sampling.updated(prior_steps=np.int64(2), prior_guidance=np.float32(1.5))
    assert json.dumps(sampling.as_dict())
    expected = pipe.sample_prior(text, sampling, seed=3)
    assert torch.equal(pipe.sample_prior(text, sampling, seed=np.int64(3)), expected)  # type: ignore[arg-type]
    assert torch.equal(pipe.sample_prior(text, sampling, seed=torch.tensor([3])), expected)  # type: ignore[arg-type]
    for seed in (-1, LARGEST_SEED + 1, 2**64, "3", 1.0):
        with pytest.raises(ValueError, match=f"seed.*{seed}"):
            pipe.sample_prior(text, sampling, seed=seed)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NUMBERS)
def test_what_is_no_number_is_refused(pipe: WuerstchenPipeline, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(TextEncoder, "forward", lambda *args: pytest.fail("work has begun"))
    for value in WRONG:
        if not (value == 2.5 and "guidance" in name):
            with pytest.raises(ValueError, match=name):
                pipe.generate(PROMPT, **{name: value})


@pytest.mark.parametrize("seed", [-1, LARGEST_SEED, 2**64, 10**30, [3, -1], [3, "4"], [1.5, 2], None, "random"])
def test_invalid_seeds(pipe: WuerstchenPipeline, seed: Any) -> None:
    with pytest.raises(ValueError, match="seed"):
        pipe.generate(PROMPT, count=2, seed=seed)
    with pytest.raises(ValueError, match="seed"):
        pipe.reconstruct(picture(), seed=seed)


@pytest.mark.parametrize("value", ["0.5", None, True, float("nan"), [0.5, 0.5]])
def test_invalid_strengths_and_borders(pipe: WuerstchenPipeline, value: Any) -> None:
    with pytest.raises(ValueError, match="strength"):
        pipe.variations(picture(), strength=value)
    with pytest.raises(ValueError, match="left"):
        pipe.outpaint(picture(), PROMPT, left=value)
    with pytest.raises(ValueError, match="fraction"):
        pipe.interpolate(PROMPT, "a cat", fractions=[value])
    with pytest.raises(ValueError, match="steps"):
        pipe.interpolate(PROMPT, "a cat", steps=value)


def test_weights_that_are_read_as_written_are_named_once(bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
    pipe = WuerstchenPipeline.load(bundle)
    for text in ("a (red:1.3) apple", "a (red:1.3) apple", "a (red) apple: 3", "at 10:30 (a: b)"):
        pipe.generate(text, prior_steps=1, decoder_steps=1)
    messages = [record.getMessage() for record in caplog.records]
    assert sum("(red:1.3)" in message for message in messages) == 1
    assert not any("(red)" in message or "(a: b)" in message for message in messages)


@pytest.mark.parametrize(
    "value", [None, 5, b"a", ["a", None], {"a": "x"}, {"a": None}, {5: 1}, {"a": True}, [["a"]]], ids=str
)
def test_what_is_no_prompt(pipe: WuerstchenPipeline, value: Any) -> None:
    with pytest.raises(ValueError, match="prompt|weight"):
        pipe.generate(value, prior_steps=1, decoder_steps=1)
    with pytest.raises(ValueError, match="prompt|weight"):
        pipe.generate("a", negative=value, prior_steps=1, decoder_steps=1)


@pytest.mark.parametrize("source", [None, 5, b"demo", {"prior": 5}])
def test_what_is_no_source(source: Any) -> None:
    with pytest.raises(ValueError, match="path"):
        WuerstchenPipeline.load(source)


def test_what_is_no_callback(pipe: WuerstchenPipeline) -> None:
    with pytest.raises(ValueError, match="callback 3 "):
        pipe.generate(PROMPT, callback=3)  # type: ignore[arg-type]
