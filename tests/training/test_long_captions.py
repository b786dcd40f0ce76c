"""Captions of more than 75 tokens: read whole as in generation, in a batch with short ones, or cut."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.golden_data import assert_near
from helpers.networks import NETWORKS
from helpers.picture_folders import picture, write_folder
from helpers.tiny_model import write_tiny_bundle
from torch import Tensor

from wuerstchen_core.checkpoints import load_text_encoder
from wuerstchen_core.models.text_encoder import TextEncoder, tokenize_whole
from wuerstchen_core.training.config import read_config
from wuerstchen_core.training.data.build_cache import make_cache
from wuerstchen_core.training.rng import StepRandom
from wuerstchen_core.training.run import run
from wuerstchen_core.training.stages.decoder import DecoderStage
from wuerstchen_core.training.stages.prior import PriorStage
from wuerstchen_core.training.stages.text_tower import attach_text_encoder

CAPTIONS = ("a red apple", "a red apple " * 40, "blue " * 75, "small " * 76)  # 1, 2, 1 and 2 chunks
CONFIG = """
start = {bundle}
[inputs]
encoder = {bundle}
text = {bundle}
vqgan = {bundle}
decoder = {bundle}
[data]
source = {source}
size = 64
multiple = 64
workers = 0
[cache]
dtype = "fp32"
[noise]
text_drop = 0.0
[train]
steps = 2
batch = 4
lr = 1e-3
sheet_every = 2
"""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bundle(tmp_path_factory.mktemp("model") / "tiny.safetensors")


@pytest.fixture
def config(tmp_path: Path, bundle: Path) -> Path:
    files: dict[str, bytes] = {}
    for number, caption in enumerate(CAPTIONS):
        files |= {f"{number}.png": picture(number), f"{number}.txt": caption.encode()}
    names = {"bundle": bundle, "source": write_folder(tmp_path / "in", files)}
    text = CONFIG.format(**{name: json.dumps(path.as_posix()) for name, path in names.items()})
    path = tmp_path / "config.toml"
    path.write_text(f"run = {json.dumps((tmp_path / 'run').as_posix())}\n{text}", encoding="utf-8")
    return path


def batch_of(stage: Any, root: Path) -> tuple[list[int], tuple[Any, ...]]:
    """Returns the numbers of a batch's captions, if they are not cached, and the stage's batch."""
    stage.dataset.start_reading(0, "", batch=4, seed=0, cache=root, rank=0, world=1)
    picked = stage.dataset.sample_batch(StepRandom(0, 0, 4))
    stage.dataset.sample_batch = lambda rng: picked
    stripped = [caption.strip() for caption in CAPTIONS]
    return [stripped.index(text) for text in picked.captions if text], stage.batch(0, StepRandom(0, 0, 4))


def numbers_and_states(config: Path, *changes: str) -> tuple[list[int], Tensor, Tensor | None]:
    stage = PriorStage(read_config(config, list(changes)))
    numbers, (*_, states, mask) = batch_of(stage, config.parent)
    return numbers, states, mask


@torch.no_grad()
@pytest.mark.parametrize("name", ["prior", "decoder", "token_decoder"])
@pytest.mark.parametrize("training", [False, True])
def test_a_padded_text_counts_as_alone(name: str, training: bool) -> None:
    network = NETWORKS[name].perturbed().train(training)  # without dropout
    *inputs, text = NETWORKS[name].inputs()
    padded = torch.cat([text, torch.randn_like(text)], dim=1)
    mask = torch.arange(padded.shape[1]) < torch.tensor([text.shape[1], padded.shape[1], 2])[:, None]
    together = network(*inputs, padded, text_mask=mask)
    for i in range(3):
        alone = network(*(x[i : i + 1] for x in inputs), padded[i : i + 1, mask[i]])
        assert_near(together[i : i + 1], alone, 1e-4)
    assert (together[2] - network(*inputs, padded)[2]).abs().max() > 1e-4


@torch.no_grad()
def test_the_states_of_a_batch_are_those_of_generation(config: Path, bundle: Path) -> None:
    numbers, states, mask = numbers_and_states(config)
    tower = load_text_encoder(bundle)
    assert sorted(numbers) == [0, 1, 2, 3] and states.shape[1] == 2 * 77 and mask is not None
    for row, kept, number in zip(states, mask, numbers, strict=True):
        expected = tower.encode([CAPTIONS[number]])[0]
        assert len(expected) == 77 * (1 + number % 2) and int(kept.sum()) == len(expected)
        assert_near(row[: len(expected)], expected, 1e-5)


@torch.no_grad()
def test_captions_are_cut_by_choice_and_counted(config: Path, bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    numbers, states, mask = numbers_and_states(config, "data.long_captions=cut")
    whole = {number: load_text_encoder(bundle).encode([CAPTIONS[number]])[0] for number in numbers}
    assert mask is None and states.shape[1] == 77
    for row, number in zip(states, numbers, strict=True):
        assert_near(row, whole[number][:77], 1e-5)
    assert "2 captions" in caplog.text and "75 tokens" in caplog.text and "cut" in caplog.text
    with pytest.raises(ValueError, match="long_captions.*whole"):
        numbers_and_states(config, "data.long_captions=half")


@torch.no_grad()
def test_a_cache_has_whole_captions(config: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    folder = config.parent / "cache"
    make_cache(config, [f"cache.output='{folder}'"])
    assert "2 captions" in caplog.text and "whole" in caplog.text
    source = f"data.source='{folder}'"
    _, states, mask = numbers_and_states(config)
    _, cached, cached_mask = numbers_and_states(config, source)
    assert mask is not None and cached_mask is not None
    assert torch.equal(mask, cached_mask)
    assert_near(cached * mask[..., None], states * mask[..., None], 1e-5)
    _, cut, none = numbers_and_states(config, source, "data.long_captions=cut")
    assert none is None and torch.equal(cut, cached[:, :77])
    _, empty, none = numbers_and_states(config, source, "noise.text_drop=1.0")
    assert none is None and empty.shape[1] == 77 and torch.equal(empty[0], empty[1])


def test_a_cache_of_cut_captions_says_so(config: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = config.parent / "cache"
    make_cache(config, [f"cache.output='{folder}'", "data.long_captions=cut"])
    caplog.set_level(logging.INFO)
    _, states, mask = numbers_and_states(config, f"data.source='{folder}'")
    assert mask is None and states.shape[1] == 77 and "are cut after 75 tokens" in caplog.text


@pytest.mark.parametrize("stage", ["prior", "decoder"])
def test_a_stage_trains_on_long_captions_and_shows_them(config: Path, stage: str) -> None:
    file = run(stage, config, [])
    assert (file.parent / "sheet-000002.png").exists()


def test_the_mask_reaches_the_network(config: Path) -> None:
    """A loss does not depend on what the padding contains."""
    stage = DecoderStage(read_config(config, []))
    _, (*others, states, mask) = batch_of(stage, config.parent)
    net = stage.net.eval()
    one, two = (stage.loss(net, *others, torch.where(mask[..., None], states, x), mask) for x in (0.0, 9.0))
    assert torch.allclose(one, two) and not torch.allclose(one, stage.loss(net, *others, states, None))


@torch.no_grad()
def test_the_text_encoder_of_a_lora_reads_whole_captions() -> None:
    prior, tower = (NETWORKS[name].perturbed() for name in ("prior", "text_encoder"))
    assert isinstance(tower, TextEncoder)
    x, t, _ = NETWORKS["prior"].inputs()
    expected = prior(x[:1], t[:1], tower.encode([CAPTIONS[1]]))
    attach_text_encoder(prior, tower)  # type: ignore[arg-type]
    tokens = torch.stack(tokenize_whole(CAPTIONS[1]))[:, None]
    assert tokens.shape == (2, 1, 2, 77)
    assert_near(prior(x[:1], t[:1], tokens), expected, 1e-4)
