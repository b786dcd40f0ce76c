"""Adapting the shipped model: the twelve images, the configurations, the page."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from tools.demo import adapt
from tools.demo.edits import TILE, grid
from wuerstchen_core.common.dataclass_config import from_table
from wuerstchen_core.demo.vocabulary import COLOURS, SIZES, THINGS, TRAINED_THINGS, caption
from wuerstchen_core.training.config import LoopConfig, check_tables, read_config
from wuerstchen_core.training.data.demo import DemoDataConfig
from wuerstchen_core.training.data.filters import ImageDataConfig
from wuerstchen_core.training.stages.adapters import AdapterConfig
from wuerstchen_core.training.stages.lora import LoraStage
from wuerstchen_core.training.stages.prior import PriorStage

NUMBERS = {
    "resolution": {"before": {"percent": 1.5, "count": 48}, "after": {"percent": 98.0, "count": 48}, "seconds": 400},
    "thing": {
        "before": {"percent": 0.0, "count": 24},
        "after": {"percent": 75.0, "count": 24},
        "known_before": {"percent": 100.0, "count": 48},
        "known_after": {"percent": 90.0, "count": 48},
        "seconds": 200,
    },
}


def test_shipped_models_are_not_trained_on_the_new_thing() -> None:
    assert THINGS.index(adapt.NEW_THING) == TRAINED_THINGS


def test_twelve_images_have_captions_and_the_other_scenes_are_judged(tmp_path: Path) -> None:
    pytest.importorskip("resvg_py", reason="drawing needs resvg-py")
    others = adapt.write_twelve_images(tmp_path)
    images = sorted(tmp_path.glob("*.png"))
    assert len(images) == 12
    assert all(adapt.NEW_THING.name in path.with_suffix(".txt").read_text("utf-8") for path in images)
    with Image.open(images[0]) as image:
        assert image.size == (256, 256)
    assert len(others) == (len(COLOURS) - adapt.TRAINING_BACKGROUNDS) * len(SIZES)
    assert len({caption(scene) for scene in others}) == 4
    captions = {path.with_suffix(".txt").read_text("utf-8") for path in images}
    assert not captions & {caption(scene) for scene in others}


def test_the_configurations_are_valid() -> None:
    larger, new = (read_config(path, []) for path in (adapt.RECIPE / "resolution.toml", adapt.THING_CONFIG))
    check_tables(larger, PriorStage.tables)
    check_tables(new, LoraStage.tables)
    assert from_table(DemoDataConfig, larger["data"], "data").canvas == adapt.LARGER
    assert from_table(ImageDataConfig, new["data"], "data").sizes == ((256, 256),)
    assert from_table(AdapterConfig, new["lora"], "lora").targets
    for config in (larger, new):
        from_table(LoopConfig, config["train"], "train")


def test_the_page_has_a_row_for_each_measurement() -> None:
    text = adapt.page(NUMBERS)
    assert "| at 384x384 pixels | 48 | 400 | 1.5 % | 98.0 % |" in text
    assert f"| {adapt.NEW_THING.name}, from twelve images | 24 | 200 | 0.0 % | 75.0 % |" in text
    assert "| known things, without and with that LoRA | 48 | 200 | 100.0 % | 90.0 % |" in text
    assert "{" not in text


def test_a_grid_stacks_its_rows() -> None:
    red, blue = (Image.new("RGB", (256, 256), colour) for colour in ("red", "blue"))
    image = grid([[red], [red, blue]], adapt.COLUMNS)
    assert image.size == (adapt.COLUMNS * TILE, 2 * TILE)
    assert image.getpixel((64, 64)) == (255, 0, 0) and image.getpixel((TILE + 64, TILE + 64)) == (0, 0, 255)
