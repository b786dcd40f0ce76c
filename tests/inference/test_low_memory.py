"""`low_memory`: the same pictures with one network in memory at a time."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.cli_runs import failure, pixels, run
from helpers.lora_forms import FORMS, attention_of_prior, attention_of_tower, random_factors
from helpers.networks import TEXT
from helpers.tiny_model import METADATA, write_tiny_bundle
from PIL import Image
from safetensors.torch import save_file

from wuerstchen_core import WuerstchenPipeline
from wuerstchen_core.checkpoints import PARTS_OF, read_part, save_bundle
from wuerstchen_core.checkpoints.lora_merge import LoraStack

PROMPTS = ["a red apple", "a " * 100, "a small apple on blue"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of the tiny models, a LoRA of a prior and its tower, and an embedding."""
    folder = tmp_path_factory.mktemp("low_memory")
    for release in ("v1", "v2"):
        write_tiny_bundle(folder / f"{release}.safetensors", release=release)
    lora = FORMS["diffusers"].write(
        random_factors(attention_of_prior()), random_factors(attention_of_tower(TEXT.width), seed=1)
    )
    save_file(lora, folder / "lora.safetensors")
    save_file({"clip_g": torch.randn(2, TEXT.width)}, folder / "cat.safetensors")
    return folder


@pytest.fixture
def alive(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """The networks that are in memory, each time that `low_memory` has read one."""
    built: list[tuple[str, weakref.ref[Any]]] = []
    seen: list[tuple[str, ...]] = []
    original = LoraStack.apply

    def apply(loras: LoraStack, network: Any, name: str) -> None:  # called for each network that was read for its use
        built.append((name, weakref.ref(network)))
        seen.append(tuple(name for name, one in built if one() is not None))
        original(loras, network, name)

    monkeypatch.setattr(LoraStack, "apply", apply)
    return seen


def both(source: Any, **options: Any) -> list[WuerstchenPipeline]:
    """Returns a model that is loaded whole, and one with `low_memory`."""
    options = {"device": "cpu", "dtype": "fp32", **options}
    return [WuerstchenPipeline.load(source, low_memory=low, **options) for low in (False, True)]


def assert_same(images: list[list[Image.Image]]) -> None:
    one, other = map(pixels, images)
    assert np.array_equal(one, other) and one.std() > 0


def test_text_to_picture_one_network_at_a_time(folder: Path, alive: list[tuple[str, ...]]) -> None:
    whole, low = both(folder / "v2.safetensors")
    assert repr(whole) == repr(low) and (low.device, low.dtype) == (whole.device, whole.dtype)
    assert_same([pipe.generate(PROMPTS, negative="blue", count=2, seed=3) for pipe in (whole, low)])
    # Each once, whatever the number of prompts and their lengths; both stages share the text encoder.
    assert alive == [("prior_text_encoder",), ("prior",), ("decoder",), ("vqgan",)]
    low.to(torch.bfloat16)
    assert_same([pipe.to("bf16").generate(PROMPTS[0]) for pipe in (whole, low)])
    assert_same([pipe.generate(PROMPTS[0]) for pipe in both(folder / "v2.safetensors", dtype="int8")])


def test_v1_reads_the_codebook_with_stage_b(folder: Path, alive: list[tuple[str, ...]]) -> None:
    whole, low = both(folder / "v1.safetensors")
    assert_same([pipe.generate(PROMPTS[0]) for pipe in (whole, low)])
    stage_b = ("token_decoder",), ("token_decoder", "vqgan")
    assert alive == [("prior_text_encoder",), ("prior",), *stage_b, ("vqgan",)]


def test_edits(folder: Path, alive: list[tuple[str, ...]]) -> None:
    pipes = both(folder / "v2.safetensors")
    picture = pipes[0].generate(PROMPTS[0])[0]
    mask = Image.new("L", picture.size)
    mask.paste(255, (0, 0, 64, 64))
    assert_same([pipe.reconstruct(picture, decoder_guidance=1.5) for pipe in pipes])
    assert_same([pipe.variations(picture, strength=0.5) for pipe in pipes])
    assert_same([pipe.inpaint(picture, mask, PROMPTS[0], decoder_guidance=1.5, count=2) for pipe in pipes])
    assert_same([pipe.outpaint(picture, PROMPTS[0], left=64) for pipe in pipes])
    assert_same([pipe.interpolate(PROMPTS[0], PROMPTS[2], steps=3) for pipe in pipes])
    assert_same([pipe.interpolate(picture, PROMPTS[2], steps=3) for pipe in pipes])
    assert {len(names) for names in alive} == {1}


def test_loras_embeddings_and_separate_files(folder: Path, tmp_path: Path, alive: list[tuple[str, ...]]) -> None:
    sources = {name: tmp_path / f"{name}.safetensors" for name in PARTS_OF["v2"]}
    for name, file in sources.items():
        part = read_part(folder / "v2.safetensors", name)
        save_bundle(file, {name: part}, METADATA if name == "prior" else {}, bare=name == "vqgan")
    for source in (sources, folder / "v2.safetensors"):  # with two text encoders, and with one
        pipes = both(source, lora={folder / "lora.safetensors": 0.7})
        plain = pipes[0].generate(PROMPTS[0], prior_guidance=3)
        prompt = "a embedding:cat on blue"
        assert_same([pipe.generate(prompt, embeddings=folder / "cat.safetensors") for pipe in pipes])
        for pipe in pipes:
            pipe.set_lora_strength("lora", -2)
        changed = [pipe.generate(PROMPTS[0], prior_guidance=3) for pipe in pipes]
        assert_same(changed)
        assert not np.array_equal(pixels(changed[1]), pixels(plain))
        for pipe in pipes:
            pipe.unload_lora()
        assert_same([pipe.generate(PROMPTS[0]) for pipe in pipes])
        assert {len(names) for names in alive} == {1}


def test_stages_one_by_one(folder: Path) -> None:
    results = []
    for pipe in both(folder / "v2.safetensors"):
        text, text_b = pipe.encode_text(["a red apple"])
        features = pipe.sample_prior(text, pipe.sampling)
        latents = pipe.sample_decoder(features, text_b, pipe.sampling.updated(decoder_guidance=2.0))
        results.append([features, latents, pipe.encode(pipe.decode(latents)[0])])
    for whole, low in zip(*results, strict=True):
        assert torch.equal(whole, low)


def test_a_file_that_has_changed_is_refused(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes((folder / "v2.safetensors").read_bytes())
    pipe = both(file)[1]
    write_tiny_bundle(file, METADATA | {"licence": "another"})
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        pipe.generate(PROMPTS[0])


def test_what_needs_all_networks_is_refused(folder: Path, tmp_path: Path) -> None:
    pipe = both(folder / "v2.safetensors")[1]
    with pytest.raises(ValueError, match="low_memory"):
        pipe.save(tmp_path / "out.safetensors")
    with pytest.raises(ValueError, match="low_memory"):
        pipe.compile()


def test_command_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    command = ("generate", "--prompts", tmp_path / "prompts.txt", "--model", folder / "v2.safetensors")
    for name in ("whole", "low"):
        options = ("--device", "cpu", "--batch", "2", "--output", tmp_path / name)
        assert run(*command, *options, *(["--low-memory"] if name == "low" else [])) == 0
    names = [path.name for path in sorted((tmp_path / "whole").glob("*.png"))]
    assert len(names) == 3
    assert_same([[Image.open(tmp_path / run / name) for name in names] for run in ("whole", "low")])
    capsys.readouterr()
    message = failure(capsys, "generate", "a cat", "--model", folder / "v2.safetensors", "--low-memory", "--compile")
    assert "low_memory" in message
