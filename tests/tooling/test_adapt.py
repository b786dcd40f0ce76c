"""Adapting the shipped model: the twelve images, the configurations, the page."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import pytest
from PIL import Image

from tools.demo import adapt
from tools.demo.edits import TILE, grid
from wuerstchen_core.checkpoints.open import open_source
from wuerstchen_core.checkpoints.shipped import MODELS
from wuerstchen_core.common.dataclass_config import from_table
from wuerstchen_core.demo.vocabulary import COLOURS, SIZES, TRAINED_THINGS, caption, held_out, scenes
from wuerstchen_core.training.config import LoopConfig, check_tables, read_config
from wuerstchen_core.training.data.demo import DemoDataConfig
from wuerstchen_core.training.data.filters import ImageDataConfig
from wuerstchen_core.training.stages.adapters import AdapterConfig
from wuerstchen_core.training.stages.lora import LoraStage
from wuerstchen_core.training.stages.prior import PriorStage


def rated(percent: float, count: int) -> dict[str, float]:
    return {"percent": percent, "count": count}


def trained(new: float, known: float, seconds: int) -> dict[str, object]:
    return {"new": rated(new, 24), "known": rated(known, 192), "seconds": seconds}


NUMBERS = {
    "resolution": {"before": rated(1.5, 48), "after": rated(98.0, 48), "seconds": 400},
    "things": {
        "known": rated(96.4, 192),
        "seconds": 70,
        "potato": {
            "before": rated(0.0, 24),
            "alone": trained(75.0, 40.1, 201),
            "regularised": trained(70.8, 90.0, 202),
        },
        "tent": {"before": rated(4.2, 24), "regularised": trained(95.8, 91.1, 204)},
        "otter": {"before": rated(0.0, 24), "regularised": trained(83.3, 92.2, 206)},
    },
}


def test_shipped_models_are_not_trained_on_the_new_things() -> None:
    shipped = [open_source(name, headers_only=True).metadata["vocabulary"]["things"] for name in MODELS]
    assert len(adapt.NEW_THINGS) == 3 and not {thing.name for thing in adapt.NEW_THINGS} & {*chain(*shipped)}


def test_twelve_images_have_captions_and_the_other_scenes_are_judged(tmp_path: Path) -> None:
    pytest.importorskip("resvg_py", reason="drawing needs resvg-py")
    thing = adapt.NEW_THINGS[1]
    others = adapt.write_twelve_images(tmp_path, thing)
    images = sorted(tmp_path.glob("*.png"))
    assert len(images) == 12
    assert all(thing.name in path.with_suffix(".txt").read_text("utf-8") for path in images)
    with Image.open(images[0]) as image:
        assert image.size == (256, 256)
    assert len(others) == (len(COLOURS) - adapt.TRAINING_BACKGROUNDS) * len(SIZES)
    assert len({caption(scene) for scene in others}) == 4
    captions = {path.with_suffix(".txt").read_text("utf-8") for path in images}
    assert not captions & {caption(scene) for scene in others}


def test_a_regularisation_set_has_known_things_that_are_not_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(adapt, "command_line", started.append)
    adapt.generate_known_images(tmp_path / "known")
    [(command, option, prompts, *_)] = started
    lines = Path(prompts).read_text("utf-8").splitlines()
    allowed = {caption(scene) for scene in scenes() if scene.thing < TRAINED_THINGS and not held_out(scene)}
    assert (command, option) == ("generate", "--prompts")
    assert len({*lines}) == len(lines) == adapt.REGULARISATION and allowed.issuperset(lines)


def test_the_configurations_are_valid() -> None:
    larger, new = (read_config(path, []) for path in (adapt.RECIPE / "resolution.toml", adapt.THING_CONFIG))
    check_tables(larger, PriorStage.tables)
    check_tables(new, LoraStage.tables)
    assert from_table(DemoDataConfig, larger["data"], "data").canvas == adapt.LARGER
    data = from_table(ImageDataConfig, new["data"], "data")
    assert data.sizes == ((256, 256),) and [part.regularisation for part in data.parts] == [False, True]
    assert from_table(AdapterConfig, new["lora"], "lora").targets
    for config in (larger, new):
        from_table(LoopConfig, config["train"], "train")


def test_the_page_has_a_row_for_each_measurement() -> None:
    text = adapt.page(NUMBERS)
    assert "| 48 | 400 | 1.5 % | 98.0 % |" in text
    assert "| potato | twelve images | 201 | 0.0 % | 75.0 % | 96.4 % | 40.1 % |" in text
    assert "| tent | and the regularisation set | 204 | 4.2 % | 95.8 % | 96.4 % | 91.1 % |" in text
    assert "of 24 images" in text and "of 192 held-out images" in text and "(70 core-seconds" in text
    assert "{" not in text


def test_a_grid_stacks_its_rows() -> None:
    red, blue = (Image.new("RGB", (256, 256), colour) for colour in ("red", "blue"))
    image = grid([[red], [red, blue]], adapt.COLUMNS)
    assert image.size == (adapt.COLUMNS * TILE, 2 * TILE)
    assert image.getpixel((64, 64)) == (255, 0, 0) and image.getpixel((TILE + 64, TILE + 64)) == (0, 0, 255)
