"""The commands that take pictures: what they write, what they say of it, and that a failure is one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.cli_runs import PROMPT, ROUNDING, failure, run
from PIL import Image

from wuerstchen_core import WuerstchenPipeline
from wuerstchen_core.cli.save import METADATA_KEY

SIZE = (128, 64)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a picture, another, a mask, and a mask of another size."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", SIZE, "red").save("cat.png")
    Image.new("RGB", SIZE, "blue").save("dog.JPG")
    mask = Image.new("L", SIZE)
    mask.paste(255, (64, 0, *SIZE))
    mask.save("mask.png")
    Image.new("L", (64, 64), 255).save("small.png")
    return tmp_path


def painted(capsys: pytest.CaptureFixture[str], bundle: Path, *arguments: str) -> list[tuple[str, dict[str, Any]]]:
    """The files that a command writes, and how each says it was made."""
    assert run(*arguments, "--model", bundle, "--device", "cpu") == 0
    out, err = capsys.readouterr()
    assert err == ""
    made = []
    for name in out.splitlines():
        with Image.open(name) as image:
            made.append((name, json.loads(image.text[METADATA_KEY])))  # type: ignore[attr-defined]
    return made


def same(file: str, image: Image.Image) -> bool:
    with Image.open(file) as written:
        return bool(np.abs(np.asarray(written).astype(int) - np.asarray(image)).max() <= ROUNDING)


def test_reconstruct(bundle: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    [(name, made)] = painted(capsys, bundle, "reconstruct", "cat.png", "--seed", "7", "--decoder-steps", "3")
    assert name == "cat-reconstruct.png"
    assert made["command"] == "reconstruct" and made["image"] == "cat.png" and made["seed"] == 7
    assert made["decoder_steps"] == 3 and (made["width"], made["height"]) == SIZE and "temperature" not in made
    pipe = WuerstchenPipeline.load(bundle, device="cpu")
    assert same(name, pipe.reconstruct("cat.png", seed=7, decoder_steps=3)[0])


def test_variations(bundle: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = "variations cat.png --strength 0.4 --count 2 --seed 3 --width 64 --height 64 --prompt red"
    first, second = painted(capsys, bundle, *command.split(), "--prior-steps", "2")
    assert (first[0], second[0]) == ("cat-variations.png", "cat-variations-2.png")
    assert first[1]["strength"] == 0.4 and first[1]["prompt"] == "red" and first[1]["prior_steps"] == 2
    assert (first[1]["seed"], second[1]["seed"]) == (3, 4) and first[1]["width"] == 64
    pipe = WuerstchenPipeline.load(bundle, device="cpu")
    options: dict[str, Any] = {"strength": 0.4, "width": 64, "height": 64, "prior_steps": 2}
    for (name, _), image in zip(
        (first, second), pipe.variations("cat.png", "red", seed=3, count=2, **options), strict=True
    ):
        assert same(name, image)


def test_inpaint(bundle: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ("inpaint", "cat.png", "mask.png", PROMPT, "--seed", "2")
    [(name, made)], [(raw, _)] = painted(capsys, bundle, *command), painted(capsys, bundle, *command, "--no-composite")
    assert made["image"] == "cat.png" and made["mask"] == "mask.png" and made["prompt"] == PROMPT
    assert (name, raw) == ("cat-inpaint.png", "cat-inpaint-2.png") and made["composite"] and made["strength"] == 1.0
    pipe = WuerstchenPipeline.load(bundle, device="cpu")
    assert same(name, pipe.inpaint("cat.png", "mask.png", PROMPT, seed=2)[0])
    assert same(raw, pipe.inpaint("cat.png", "mask.png", PROMPT, seed=2, composite=False)[0])
    assert not same(raw, Image.open(name))


def test_outpaint(bundle: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    [(name, made)] = painted(capsys, bundle, "outpaint", "cat.png", PROMPT, "--left", "30", "--bottom", "7")
    assert made["left"] == 30 and made["top"] == 0 and (made["width"], made["height"]) == (158, 71)
    pipe = WuerstchenPipeline.load(bundle, device="cpu")
    assert same(name, pipe.outpaint("cat.png", PROMPT, left=30, bottom=7)[0])


def test_interpolate(bundle: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    way = painted(capsys, bundle, "interpolate", "cat.png", "dog.JPG", "--steps", "3", "--seed", "4")
    assert [name for name, _ in way] == ["cat-to-dog.png", "cat-to-dog-2.png", "cat-to-dog-3.png"]
    assert way[0][1]["a"] == "cat.png" and way[0][1]["steps"] == 3
    pipe = WuerstchenPipeline.load(bundle, device="cpu")
    with Image.open("cat.png") as a, Image.open("dog.JPG") as b:
        for (name, _), image in zip(way, pipe.interpolate(a, b, steps=3, seed=4), strict=True):
            assert same(name, image)
    way = painted(capsys, bundle, "interpolate", PROMPT, "small", "--steps", "2", "--output", "way.png")
    assert [name for name, _ in way] == ["way-1.png", "way-2.png"] and way[0][1]["b"] == "small"
    assert same("way-2.png", pipe.generate("small")[0])


def test_json(bundle: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inpaint", "cat.png", "mask.png", PROMPT, "--model", bundle, "--json", "--output", "x.webp") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["command"] == "inpaint" and report["prompt"] == PROMPT and report["load_seconds"] > 0
    [image] = report["images"]
    assert image["path"] == "x.webp" and set(image["seconds"]) == {"text", "prior", "decoder", "picture"}


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("reconstruct nowhere.png", "nowhere.png does not exist"),
        ("reconstruct text.png", "text.png is no picture that can be read"),
        ("variations cut.png", "cut.png is cut short or damaged"),
        ("variations cat.png --strength 1.5", "a strength of 1.5 cannot be used"),
        ("variations cat.png --strength x", "invalid float value: 'x'"),
        ("variations cat.png --width 100", "the nearest legal size is 128x64"),
        ("variations cat.png --count 0", "a count of at least 1"),
        ("inpaint cat.png small.png apple", "the mask is 64x64 pixels and the picture 128x64"),
        ("inpaint cat.png black.png apple", "the mask marks nothing"),
        ("inpaint cat.png mask.png", "PROMPT"),
        ("inpaint cat.png mask.png apple --width 64", "unrecognized arguments: --width"),
        ("outpaint cat.png apple", "borders of 0, 0, 0 and 0"),
        ("outpaint cat.png apple --left 2000", "a canvas of 2128x64 pixels is too large"),
        ("interpolate cat.png nowhere.png", "nowhere.png does not exist"),
        ("interpolate cat.png apple --steps 1", "1 steps were asked for"),
        ("reconstruct cat.png --output nowhere/x.png", "the folder nowhere does not exist"),
        ("reconstruct cat.png --prior-steps 4", "unrecognized arguments: --prior-steps"),
    ],
)
def test_a_failure_is_one_line(
    bundle: Path, here: Path, capsys: pytest.CaptureFixture[str], command: str, message: str
) -> None:
    (here / "text.png").write_text("version https://git-lfs.example/spec/v1\n")
    (here / "cut.png").write_bytes((here / "cat.png").read_bytes()[:-30])
    Image.new("L", SIZE).save("black.png")
    before = sorted(here.iterdir())
    assert message in failure(capsys, *command.split(), "--model", bundle)
    assert sorted(here.iterdir()) == before
