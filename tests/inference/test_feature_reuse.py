"""Reuse of Stage B's deep levels in the pipeline, on tiny random models."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from helpers.cli_runs import PROMPT, pixels
from helpers.tiny_model import write_tiny_bundle
from PIL import Image
from torch import Tensor

from wuerstchen_core import WuerstchenPipeline
from wuerstchen_core.inference import stages
from wuerstchen_core.inference.metadata import PARAMETERS, RECORD
from wuerstchen_core.inference.read_graph import record_of_graph
from wuerstchen_core.inference.records import records
from wuerstchen_core.inference.settings import SamplingSettings
from wuerstchen_core.inference.workflow import build_graph
from wuerstchen_core.models.feature_reuse import FeatureReuse, full_steps

STEPS = 5  # of Stage B; with reuse 2, steps 0, 2 and 4 are full


@pytest.fixture(scope="module", params=["v2", "v1"])
def pipe(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> WuerstchenPipeline:
    bundle = write_tiny_bundle(tmp_path_factory.mktemp("model") / "tiny.safetensors", release=request.param)
    return WuerstchenPipeline.load(bundle, device="cpu", dtype="fp32")


@contextmanager
def counting(pipe: WuerstchenPipeline) -> Iterator[Callable[[], tuple[int, int]]]:
    """Gives a function that returns how many rows the finest and the deepest level of Stage B computed since."""
    network: Any = pipe.token_decoder or pipe.decoder
    rows = [0, 0]

    def count(level: int) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Tensor, ...], out: Tensor) -> None:
            rows[level] += len(out)

        return hook

    def result() -> tuple[int, int]:
        found, rows[:] = (rows[0], rows[1]), (0, 0)
        return found

    layers = network.down_blocks[0][0], network.down_blocks[-1][1]
    hooks = [layer.register_forward_hook(count(level)) for level, layer in enumerate(layers)]
    try:
        yield result
    finally:
        for hook in hooks:
            hook.remove()


def stage_b(pipe: WuerstchenPipeline, prompt: str = PROMPT, **settings: Any) -> Tensor:
    features = torch.randn(2, 16, 2, 3, generator=torch.Generator().manual_seed(1))
    text = pipe.encode_prompt(prompt)[1].expand(2, -1, -1)
    return pipe.sample_decoder(features, text, pipe.sampling.updated(decoder_steps=STEPS, **settings), seed=3)


def test_without_reuse_nothing_changes(pipe: WuerstchenPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: Any) -> None:
        raise AssertionError

    expected = stage_b(pipe)
    monkeypatch.setattr(stages, "FeatureReuse", forbidden)
    assert torch.equal(stage_b(pipe, decoder_reuse=1), expected)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_reuse_computes_the_deep_levels_in_full_steps_only(pipe: WuerstchenPipeline, guidance: float) -> None:
    rows = 2 if guidance == 1 else 4
    with counting(pipe) as count:
        full = stage_b(pipe, decoder_guidance=guidance)
        assert count() == (STEPS * rows, STEPS * rows)
        for interval in (2, 3, 100):
            some = stage_b(pipe, decoder_guidance=guidance, decoder_reuse=interval)
            assert count() == (STEPS * rows, len(full_steps(STEPS, interval)) * rows)
            assert some.isfinite().all() and not torch.equal(some, full)


def test_both_conditions_keep_their_own_features(pipe: WuerstchenPipeline) -> None:
    """A long prompt has another number of tokens than the negative one, so that the network runs once for each."""
    with counting(pipe) as count:
        apart = stage_b(pipe, "apple " * 90, decoder_guidance=2.0, decoder_reuse=2)
        assert count() == (STEPS * 4, 3 * 4)
    assert apart.isfinite().all()


def test_guidance_that_ends_changes_the_batch(pipe: WuerstchenPipeline) -> None:
    """From step 1 on, the scale is 1 and only the conditional rows run, which have no features yet."""
    with counting(pipe) as count:
        stage_b(pipe, decoder_guidance=1.2, decoder_guidance_end=0.0, decoder_reuse=2)
        assert count() == (4 + 4 * 2, 4 + 3 * 2)


def test_edits_reuse(pipe: WuerstchenPipeline) -> None:
    image = Image.new("RGB", (64, 64), "red")
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    calls = [
        lambda **more: pipe.inpaint(image, mask, PROMPT, **more),
        lambda **more: pipe.variations(image, PROMPT, **more),
        lambda **more: pipe.outpaint(image, PROMPT, right=32, **more),
        lambda **more: pipe.reconstruct(image, **more),
        lambda **more: pipe.generate([PROMPT], width=64, height=64, **more),
        lambda **more: pipe.interpolate(PROMPT, "a blue apple", steps=2, width=64, height=64, **more),
    ]
    with counting(pipe) as count:
        for call in calls:
            [*_, picture] = call(decoder_steps=STEPS, decoder_reuse=2)
            shallow, deep = count()
            assert deep * STEPS == shallow * 3 and '"decoder_reuse": 2' in picture.info[RECORD]


def test_features_are_freed(pipe: WuerstchenPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[Any]] = []

    def recorded(interval: int, times: Any) -> FeatureReuse:
        reuse = FeatureReuse(interval, times)
        alive.append(weakref.ref(reuse))
        return reuse

    def stop(stage: str, done: int, steps: int, denoised: Tensor | None) -> None:
        if stage == "decoder" and done == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(stages, "FeatureReuse", recorded)
    run = {"width": 64, "height": 64, "decoder_steps": STEPS, "decoder_reuse": 2}
    pipe.generate(PROMPT, **run)
    with pytest.raises(KeyboardInterrupt):
        pipe.generate(PROMPT, callback=stop, **run)
    gc.collect()
    assert len(alive) == 2 and not any(reference() for reference in alive)


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "2"])
def test_other_values_are_refused(pipe: WuerstchenPipeline, value: Any) -> None:
    with pytest.raises(ValueError, match="decoder_reuse") as error:
        pipe.generate(PROMPT, decoder_reuse=value)
    assert "\n" not in str(error.value)


def test_metadata_name_it_where_it_is_on(pipe: WuerstchenPipeline) -> None:
    [plain], [record] = (
        records(pipe, "generate", {"prompt": PROMPT, **more}, [Image.new("RGB", (128, 64))])
        for more in ({}, {"decoder_reuse": 3})
    )
    assert "decoder_reuse" not in plain and record == {**plain, "decoder_reuse": 3}
    for found, expected in ((plain, None), (record, 3)):
        graph = build_graph({**found, "model": "tiny"})
        assert graph is not None and record_of_graph(graph[0]).get("decoder_reuse") == expected
    assert build_graph({**record, "model": "tiny", "decoder_reuse": 101}) is None  # beyond the node's widget
    [picture] = pipe.generate(PROMPT, width=64, height=64, decoder_reuse=3)
    assert "Decoder reuse: 3" in picture.info[PARAMETERS]
    assert pixels([picture]).shape == (1, 64, 64, 3)


def test_a_models_own_settings_do_not_turn_it_on() -> None:
    assert SamplingSettings.from_metadata({"sampling": {"decoder_reuse": 2}}).decoder_reuse == 1
