"""The commands that read images: files, metadata and errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.cli_runs import PROMPT, ROUNDING, failure, run
from PIL import Image, ImageOps

from wuerstchen_core import WuerstchenPipeline
from wuerstchen_core.inference.metadata import RECORD as METADATA_KEY

SIZE = (128, 64)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two images, a mask, and a mask of another size."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", SIZE, "red").save("cat.png")
    Image.new("RGB", SIZE, "blue").save("dog.JPG")
    mask = Image.new("L", SIZE)
    mask.paste(255, (64, 0, *SIZE))
    mask.save("mask.png")
    Image.new("L", (64, 64), 255).save("small.png")
    return tmp_path


def saved(
    capsys: pytest.CaptureFixture[str], bundle: Path, *arguments: str, says: str = ""
) -> list[tuple[str, dict[str, Any]]]:
    """Runs a command that says one line with `says`, or nothing; returns names and metadata of the files it writes."""
    assert run(*arguments, "--model", bundle, "--device", "cpu") == 0
    out, err = capsys.readouterr()
    assert err.count("\n") == bool(says) and says in err
    metadata = []
    for name in out.splitlines():
        with Image.open(name) as image:
            metadata.append((name, json.loads(image.text[METADATA_KEY])))  # type: ignore[attr-defined]
    return metadata


def equals(file: str, image: Image.Image) -> bool:
    with Image.open(file) as written:
        return bool(np.abs(np.asarray(written).astype(int) - np.asarray(image)).max() <= ROUNDING)


def test_reconstruct(bundle: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    [(name, metadata)] = saved(capsys, bundle, "reconstruct", "cat.png", "--seed", "7", "--decoder-steps", "3")
    assert name == "cat-reconstruct.png"
    assert metadata["command"] == "reconstruct" and metadata["image"] == "cat.png" and metadata["seed"] == 7
    assert (
        metadata["decoder_steps"] == 3
        and (metadata["width"], metadata["height"]) == SIZE
        and "temperature" not in metadata
    )
    pipe = WuerstchenPipeline.load(bundle, device="cpu")
    assert equals(name, pipe.reconstruct("cat.png", seed=7, decoder_steps=3)[0])


def test_variations(bundle: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = "variations cat.png --strength 0.4 --count 2 --seed 3 --width 64 --height 64 --prompt red"
    first, second = saved(capsys, bundle, *command.split(), "--prior-steps", "2")
    assert (first[0], second[0]) == ("cat-variations.png", "cat-variations-2.png")
    assert first[1]["strength"] == 0.4 and first[1]["prompt"] == "red" and first[1]["prior_steps"] == 2
    assert (first[1]["seed"], second[1]["seed"]) == (3, 4) and first[1]["width"] == 64
    pipe = WuerstchenPipeline.load(bundle, device="cpu")
    options: dict[str, Any] = {"strength": 0.4, "width": 64, "height": 64, "prior_steps": 2}
    for (name, _), image in zip(
        (first, second), pipe.variations("cat.png", "red", seed=3, count=2, **options), strict=True
    ):
        assert equals(name, image)


def test_inpaint(bundle: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ("inpaint", "cat.png", "mask.png", PROMPT, "--seed", "2")
    [(name, metadata)], [(raw, _)] = (
        saved(capsys, bundle, *command, *more, says="luminance), 50.0%") for more in ([], ["--no-composite"])
    )
    assert metadata["image"] == "cat.png" and metadata["mask"] == "mask.png" and metadata["prompt"] == PROMPT
    assert (
        (name, raw) == ("cat-inpaint.png", "cat-inpaint-2.png")
        and metadata["composite"]
        and metadata["strength"] == 1.0
    )
    pipe = WuerstchenPipeline.load(bundle, device="cpu")
    assert equals(name, pipe.inpaint("cat.png", "mask.png", PROMPT, seed=2)[0])
    assert equals(raw, pipe.inpaint("cat.png", "mask.png", PROMPT, seed=2, composite=False)[0])
    assert not equals(raw, Image.open(name))
    with Image.open("cat.png") as image, Image.open("mask.png") as mask:
        image.putalpha(ImageOps.invert(mask))
        image.save("hole.png")
    [(hole, _)] = saved(capsys, bundle, "inpaint", "cat.png", "hole.png", *command[3:], says="alpha), 50.0%")
    assert equals(hole, Image.open(name))


def test_outpaint(bundle: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    [(name, metadata)] = saved(capsys, bundle, "outpaint", "cat.png", PROMPT, "--left", "30", "--bottom", "7")
    assert metadata["left"] == 30 and metadata["top"] == 0 and (metadata["width"], metadata["height"]) == (158, 71)
    pipe = WuerstchenPipeline.load(bundle, device="cpu")
    assert equals(name, pipe.outpaint("cat.png", PROMPT, left=30, bottom=7)[0])


def test_interpolate(bundle: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = saved(capsys, bundle, "interpolate", "cat.png", "dog.JPG", "--steps", "3", "--seed", "4")
    assert [name for name, _ in images] == ["cat-to-dog.png", "cat-to-dog-2.png", "cat-to-dog-3.png"]
    assert images[0][1]["a"] == "cat.png" and images[0][1]["steps"] == 3
    pipe = WuerstchenPipeline.load(bundle, device="cpu")
    with Image.open("cat.png") as a, Image.open("dog.JPG") as b:
        for (name, _), image in zip(images, pipe.interpolate(a, b, steps=3, seed=4), strict=True):
            assert equals(name, image)
    images = saved(capsys, bundle, "interpolate", PROMPT, "small", "--steps", "2", "--output", "way.png")
    assert [name for name, _ in images] == ["way-1.png", "way-2.png"] and images[0][1]["b"] == "small"
    assert equals("way-2.png", pipe.generate("small")[0])


def test_json(bundle: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inpaint", "cat.png", "mask.png", PROMPT, "--model", bundle, "--json", "--output", "x.webp") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["command"] == "inpaint" and report["prompt"] == PROMPT and report["load_seconds"] > 0
    [image] = report["images"]
    assert image["path"] == "x.webp" and set(image["seconds"]) == {"text", "prior", "decoder", "picture"}


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("reconstruct nowhere.png", "nowhere.png"),
        ("reconstruct text.png", "text.png"),
        ("variations cut.png", "cut.png"),
        ("variations cat.png --strength 1.5", "1.5"),
        ("variations cat.png --strength x", "'x'"),
        ("variations cat.png --width 100", "128x64"),
        ("variations cat.png --count 0", "count"),
        ("inpaint cat.png small.png apple", "64x64"),
        ("inpaint cat.png black.png apple", "mask is empty"),
        ("inpaint cat.png white.png apple", "whole picture"),
        ("inpaint cat.png mask.png", "PROMPT"),
        ("inpaint cat.png mask.png apple --width 64", "--width"),
        ("outpaint cat.png apple", "0, 0, 0"),
        ("outpaint cat.png apple --left 2000", "2128x64"),
        ("interpolate cat.png nowhere.png", "nowhere.png"),
        ("interpolate cat.png apple --steps 1", "1 steps"),
        ("reconstruct cat.png --output nowhere/x.png", "folder nowhere"),
        ("reconstruct cat.png --prior-steps 4", "--prior-steps"),
    ],
)
def test_a_failure_is_one_line(
    bundle: Path, here: Path, capsys: pytest.CaptureFixture[str], command: str, message: str
) -> None:
    (here / "text.png").write_text("version https://git-lfs.example/spec/v1\n")
    (here / "cut.png").write_bytes((here / "cat.png").read_bytes()[:-30])
    Image.new("L", SIZE).save("black.png")
    Image.new("L", SIZE, 255).save("white.png")
    before = sorted(here.iterdir())
    assert message in failure(capsys, *command.split(), "--model", bundle)
    assert sorted(here.iterdir()) == before
