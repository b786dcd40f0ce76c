"""The shipped v1 model: its size, its pictures and the published numbers."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from tools.demo.build_v1 import EVALUATION
from tools.demo.evaluate import evaluate, generate, held_out_scenes, reconstruct
from tools.demo.judge import Judge
from wuerstchen_core import WuerstchenPipeline
from wuerstchen_core.checkpoints import PARTS_OF, demo_path, read_metadata, read_part
from wuerstchen_core.checkpoints.components import component
from wuerstchen_core.demo.vocabulary import caption, unknown_words_note

pytest.importorskip("resvg_py", reason="judging needs resvg-py")

LARGEST = 8_000_000  # bytes


@pytest.fixture(scope="module")
def pipe() -> WuerstchenPipeline:
    return WuerstchenPipeline.load("demo-v1", device="cpu", dtype="fp32")


def test_it_is_a_small_complete_v1(pipe: WuerstchenPipeline) -> None:
    assert demo_path("demo-v1").stat().st_size <= LARGEST
    assert pipe.version == read_metadata("demo-v1")["version"] == "v1"
    assert all(getattr(pipe, part) is not None for part in PARTS_OF["v1"])
    assert pipe.prior_text_encoder is pipe.decoder_text_encoder


@pytest.mark.parametrize(
    ("model", "name"),
    [
        *(("demo", name) for name in ("prior", "decoder", "prior_text_encoder")),
        *(("demo-v1", name) for name in ("prior", "token_decoder", "prior_text_encoder")),
    ],
)
def test_its_sizes_can_be_read_off_its_tensors(model: str, name: str) -> None:
    """A file without metadata must load too: heads are 64 wide, and 16 in number in the token decoder."""
    part = read_part(model, name)
    read = component(name).infer_params(part.state_dict)
    if name == "prior":  # whose units are in no tensor
        read = replace(read, feature_scale=part.params.feature_scale, feature_shift=part.params.feature_shift)
    assert read == part.params


def test_it_follows_prompts(pipe: WuerstchenPipeline) -> None:
    """On held-out scenes."""
    judge, scenes = Judge(), held_out_scenes(pipe.metadata)[:2]
    for scene, image in zip(scenes, generate(pipe, scenes, seed=1), strict=True):
        assert judge.identify(np.asarray(image), scene) == scene, caption(scene)


def test_pictures_survive_the_compression(pipe: WuerstchenPipeline) -> None:
    assert min(reconstruct(pipe, held_out_scenes(pipe.metadata)[:2])[1]) > 20


def test_unknown_words_are_reported(pipe: WuerstchenPipeline) -> None:
    assert unknown_words_note(["a banana on a yellow background"], pipe.metadata, set()) is None
    note = unknown_words_note(["a cat on a yellow background"], pipe.metadata, set())
    assert note is not None and '"cat"' in note and "inspect demo-v1 --words" in note


@pytest.mark.long
def test_the_written_numbers_are_measured_again(pipe: WuerstchenPipeline) -> None:
    """Within the rounding of another machine's arithmetic: two pictures, a tenth of a decibel."""
    written, measured = json.loads(EVALUATION.read_text(encoding="utf-8")), evaluate(pipe)
    for name in ("thing", "another_thing", "background"):
        count = written[name]["count"]
        assert measured[name]["count"] == count == 3 * len(held_out_scenes(pipe.metadata))
        assert measured[name]["percent"] == pytest.approx(written[name]["percent"], abs=200 / count)
    assert measured["compressed"]["percent"] == pytest.approx(written["compressed"]["percent"], abs=200 / 40)
    assert measured["psnr"]["mean"] == pytest.approx(written["psnr"]["mean"], abs=0.1)
