"""Sample grids: images of one's own prompts at some steps, beside those of the base model."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.lora_training import write_config
from helpers.recording_trainer import CONFIG, LineStage, file_names
from helpers.tiny_model import write_tiny_bundle
from PIL import Image

from wuerstchen_core import WuerstchenPipeline
from wuerstchen_core.cli.main import main
from wuerstchen_core.training.captions import font_for
from wuerstchen_core.training.compare import compare
from wuerstchen_core.training.config import read_config
from wuerstchen_core.training.data.dataset import InMemoryDataset
from wuerstchen_core.training.loop import train
from wuerstchen_core.training.run import build_stage, run
from wuerstchen_core.training.sample_grid import GAP, LARGEST, LINE, MARGIN, PAPER, prompt_grid, write_grid

PROMPTS, SEEDS, SIDE = ["a red apple", "blue"], [3, 5], 64
TABLE = [
    f"sample.prompts={PROMPTS}", f"sample.seeds={SEEDS}", "sample.every=1", "train.steps=2", "train.save_every=1",
    "train.keep_every=1",
    f"sample.width={SIDE}", f"sample.height={SIDE}",
]  # fmt: skip
TOP, BLOCK = MARGIN + 2 * LINE, 2 * SIDE  # of the first line of text; width of the images of one model


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny.safetensors")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, bundle: Path) -> Path:
    return write_config(tmp_path_factory.mktemp("config"), bundle)


@pytest.fixture(scope="module")
def trained(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("run")
    return run("lora", config, [*TABLE, f"run='{root}'"]).parent


def blocks(path: Path) -> list[np.ndarray]:
    """Returns the images of each model in a grid: two lines and two columns."""
    pixels = np.asarray(Image.open(path))
    lines = [TOP + LINE, TOP + LINE + SIDE + GAP + LINE]
    return [
        np.concatenate([pixels[top : top + SIDE, left : left + BLOCK] for top in lines])
        for left in range(MARGIN, pixels.shape[1], BLOCK + GAP)
    ]


def test_grids_show_the_step_and_the_base_model(trained: Path) -> None:
    assert {f"samples-00000{step}.png" for step in (0, 1, 2)} <= file_names(trained)
    before, base = blocks(trained / "samples-000000.png")
    assert np.array_equal(before, base)
    assert len({base[y : y + SIDE, x : x + SIDE].tobytes() for y in (0, SIDE) for x in (0, SIDE)}) == 4
    after, still = blocks(trained / "samples-000002.png")
    with Image.open(trained / "lora.png") as preview:  # the first image, which the grid may show smaller
        assert np.array_equal(np.asarray(preview), after[: preview.height, : preview.width])
    with Image.open(trained / "lora-000001.png") as kept:  # of its own step
        first = blocks(trained / "samples-000001.png")[0]
        assert np.array_equal(np.asarray(kept), first[: kept.height, : kept.width])
    assert np.array_equal(base, still) and not np.array_equal(after, base)


def test_a_resumed_run_writes_the_same_grids(trained: Path, config: Path) -> None:
    grid = trained / "samples-000002.png"
    expected = grid.read_bytes()
    for path in (grid, trained / "checkpoint-00000002.pt"):
        path.unlink()
    run("lora", config, [*TABLE, f"run='{trained.parent}'"])
    assert grid.read_bytes() == expected


def test_the_base_model_samples_with_its_own_settings(config: Path, bundle: Path, tmp_path: Path) -> None:
    own = tmp_path / "prior.toml"
    own.write_text(re.sub(r"\[lora\].*?(?=\[train\])", "", config.read_text("utf-8"), flags=re.S), encoding="utf-8")
    folder = run("prior", own, [*TABLE, f"run='{tmp_path}'", f"start='{bundle}'"]).parent
    pipeline = WuerstchenPipeline.load(bundle, dtype="fp32")
    images = [
        np.asarray(image)
        for prompt in PROMPTS
        for image in pipeline.generate(prompt, width=SIDE, height=SIDE, seed=SEEDS, count=2)
    ]
    expected = np.concatenate([np.concatenate(images[i : i + 2], 1) for i in (0, 2)])
    assert np.array_equal(blocks(folder / "samples-000001.png")[1], expected)
    base, *steps = blocks(compare(folder, []))
    assert np.array_equal(base, expected) and len(steps) == 2  # the newest weights are those of the second step
    for number, step in enumerate(steps, 1):
        assert np.array_equal(step, blocks(folder / f"samples-00000{number}.png")[0])


def test_kept_weights_are_compared(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (trained / "lora-000007.safetensors").write_bytes(b"of an earlier run")
    assert main(["train", "compare", str(trained), "--output", str(tmp_path / "grid.png")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "grid.png")
    base, first, second = blocks(tmp_path / "grid.png")
    after, before = blocks(trained / "samples-000002.png")
    assert np.array_equal(base, before) and not np.array_equal(first, base)
    rounding, change = (np.abs(second.astype(int) - other).mean() for other in (after, base))
    assert 10 * rounding < change  # LoRAs are merged here, and beside the weights in training


def test_a_lora_that_goes_on_is_named_in_the_title_of_its_start(trained: Path) -> None:
    config = read_config(trained / "config.toml", [])
    assert build_stage("lora", config).start_title == "base model"
    config["lora"]["start"] = str(trained / "lora-000001.safetensors")
    assert "lora-000001.safetensors" in build_stage("lora", config).start_title


@pytest.mark.parametrize(
    ("folder", "change"),
    [
        (".", []),
        ("lora", ["sample.prompts=[]"]),
        ("lora", ["inputs.vqgan=no"]),
        ("lora", ["sampel.seeds=[1]"]),
    ],
)
def test_a_comparison_that_is_impossible_is_refused(trained: Path, folder: str, change: list[str]) -> None:
    with pytest.raises(ValueError, match="config.toml|sample.prompts|vqgan|sampel"):
        compare(trained.parent / folder, change)


def test_missing_networks_are_reported_once(config: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        run("lora", config, [*TABLE, f"run='{tmp_path}'", "inputs.vqgan=nowhere", "train.sheet_every=1"])
    assert not [name for name in file_names(tmp_path / "lora") if name.endswith(".png")]
    assert len([record for record in caplog.records if "vqgan under [inputs]" in record.getMessage()]) == 1


def test_missing_images_are_reported_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class WithoutPreviews(InMemoryDataset):
        def missing_previews(self) -> str:
            return "pictures on paper"

    stage = LineStage()
    stage.dataset = WithoutPreviews(torch.zeros(1, 3, 4, 4, dtype=torch.uint8))
    with caplog.at_level(logging.WARNING):
        train(stage, CONFIG, tmp_path)
    assert caplog.text.count("pictures on paper") == 1
    assert not list(tmp_path.glob("*.png"))


def test_a_negative_seed_is_refused(config: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\[sample\] seeds"):
        run("lora", config, [f"run='{tmp_path}'", "sample.seeds=[-1]"])


def test_a_prompt_in_letters_of_no_font_is_numbered(tmp_path: Path) -> None:
    image, strange = Image.new("RGB", (200, 100), "red"), "\ue123\ue124"
    grid, numbered = (prompt_grid(["a fox", text], [1], {"one": [image] * 2}) for text in (strange, "prompt 2"))
    assert np.array_equal(grid, numbered) and not np.array_equal(grid, prompt_grid(["", ""], [1], {"one": [image] * 2}))
    write_grid(tmp_path / "grid.png", grid, ["a fox", strange])
    with Image.open(tmp_path / "grid.png") as file:
        assert json.loads(file.info["prompts"]) == ["a fox", strange]


@pytest.mark.parametrize(("text", "other"), [("größe", "grotze"), ("лиса", "сила"), ("狐", "猫"), ("여우", "고양")])
def test_a_caption_has_the_letters_of_its_script(text: str, other: str) -> None:
    font = font_for(text + other)
    if font is None:
        pytest.skip("no font of this script is installed")
    assert {len({bytes(font.getmask(letter)) for letter in set(text + other)})} == {len(set(text + other))}


def test_large_images_are_scaled_and_long_prompts_wrapped() -> None:
    images = [Image.new("RGB", (4 * LARGEST, 2 * LARGEST), colour) for colour in ("red", "blue")]
    grid = prompt_grid(["x " * 100], [1], {"one": images[:1], "other": images[1:]})
    assert grid.width == 2 * (MARGIN + LARGEST) + GAP
    lines = (grid.height - MARGIN - LINE - LARGEST // 2 - GAP) // LINE
    assert lines >= 3
    y = grid.height - GAP - 1
    assert grid.getpixel((MARGIN, y)) == (255, 0, 0) and grid.getpixel((MARGIN + LARGEST + GAP, y)) == (0, 0, 255)
    assert grid.getpixel((MARGIN, y + 1)) == grid.getpixel((MARGIN + LARGEST + 1, y)) == PAPER
