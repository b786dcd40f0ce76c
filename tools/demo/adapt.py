"""Measures how much training it takes to adapt the shipped model: `python -m tools.demo.adapt`.

Fine-tunes Stage C for a new resolution, and trains a LoRA for a new object from twelve images, in minutes each. Writes
docs/adapting.md and its grid of images.
"""

from __future__ import annotations

import json
import logging
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from wuerstchen_core.checkpoints import load_prior
from wuerstchen_core.demo.artwork import CANVAS, draw
from wuerstchen_core.demo.vocabulary import COLOURS, SIZES, THINGS, Scene, caption
from wuerstchen_core.inference.pipeline import WuerstchenPipeline
from wuerstchen_core.training.run import run

from .. import DOCS, markdown_table
from .build import RECIPE
from .edits import grid
from .evaluate import held_out_scenes, judge_images, rate, right_things, subset
from .judge import Judge

logger = logging.getLogger(__name__)

TEMPLATE = Path(__file__).with_name("adapting.md.template")
THING_CONFIG = Path(__file__).with_name("new_thing.toml")
NEW_THING = THINGS[-1]  # no shipped model was trained on it
LARGER = 384  # pixels
JUDGED = 48  # held-out images at the new resolution, and of known things with the LoRA
TRAINING_BACKGROUNDS = 6  # of the twelve images; the other backgrounds are judged
BATCH = 8
SEEDS = 6  # images judged per scene of the new thing
COLUMNS = 8  # of the grid
Result = tuple[dict[str, Any], list[Image.Image]]  # rate of right things, and the first images
Comparison = tuple[dict[str, Any], list[list[Image.Image]]]  # numbers before and after, and a row of images for each


def measure(pipe: WuerstchenPipeline, scenes: Sequence[Scene], size: int = CANVAS) -> Result:
    """Generates and judges squares of `size` pixels."""
    images: list[Image.Image] = []
    for start in range(0, len(scenes), BATCH):
        prompts = [caption(scene) for scene in scenes[start : start + BATCH]]
        images += pipe.generate(prompts, seed=start, width=size, height=size)
    return rate(map(bool, right_things(judge_images(Judge(size), scenes, images)))), images[:COLUMNS]


def train(stage: str, config: Path, overrides: list[str]) -> tuple[Path, int]:
    """Runs a training; returns its weights and the core-seconds it took."""
    start = time.process_time()
    return run(stage, config, overrides), round(time.process_time() - start)


def adapt_resolution(folder: Path) -> Comparison:
    """Fine-tunes Stage C for larger images."""
    pipe = WuerstchenPipeline.load("demo")
    scenes = subset(held_out_scenes(pipe.metadata), JUDGED)
    before, first = measure(pipe, scenes, LARGER)
    weights, seconds = train("prior", RECIPE / "resolution.toml", [f"run='{folder}'"])
    pipe.prior = load_prior(weights)
    after, second = measure(pipe, scenes, LARGER)
    return {"before": before, "after": after, "seconds": seconds}, [first, second]


def write_twelve_images(folder: Path) -> list[Scene]:
    """Writes drawings of the new thing with captions; returns the scenes on the other backgrounds."""
    folder.mkdir(parents=True, exist_ok=True)
    thing, others = THINGS.index(NEW_THING), []
    for colour, name in enumerate(COLOURS):
        for size, word in enumerate(SIZES):
            scene = Scene(thing, colour, size)
            if colour >= TRAINING_BACKGROUNDS:
                others.append(scene)
                continue
            draw(scene).save(folder / f"{word}-{name}.png")
            (folder / f"{word}-{name}.txt").write_text(caption(scene), encoding="utf-8")
    return others


def adapt_thing(folder: Path) -> Comparison:
    """Trains a LoRA for a new thing; also measures known things with and without it."""
    scenes = write_twelve_images(folder / "pictures") * SEEDS
    pipe = WuerstchenPipeline.load("demo")
    known = subset(held_out_scenes(pipe.metadata), JUDGED)
    (before, first), (known_before, _) = measure(pipe, scenes), measure(pipe, known)
    source = json.dumps(str(folder / "pictures"))
    lora, seconds = train("lora", THING_CONFIG, [f"run='{folder}'", f"data.source={source}"])
    pipe = WuerstchenPipeline.load("demo", lora=lora)
    (after, second), (known_after, _) = measure(pipe, scenes), measure(pipe, known)
    numbers = {"before": before, "after": after, "known_before": known_before, "known_after": known_after}
    return {**numbers, "seconds": seconds}, [first, second]


def page(numbers: Mapping[str, Any]) -> str:
    """Returns docs/adapting.md."""

    def row(name: str, part: Mapping[str, Any], prefix: str = "") -> list[Any]:
        before, after = (part[f"{prefix}{key}"] for key in ("before", "after"))
        return [name, after["count"], part["seconds"], f"{before['percent']} %", f"{after['percent']} %"]

    rows = [
        row(f"at {LARGER}x{LARGER} pixels", numbers["resolution"]),
        row(f"{NEW_THING.name}, from twelve images", numbers["thing"]),
        row("known things, without and with that LoRA", numbers["thing"], "known_"),
    ]
    table = markdown_table(("Right thing", "images", "core-seconds", "before", "after"), rows, 4)
    return TEMPLATE.read_text("utf-8").format(size=LARGER, thing=NEW_THING.name, table=table)


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with tempfile.TemporaryDirectory() as folder:  # so that no earlier training is resumed
        larger, upper = adapt_resolution(Path(folder))
        thing, lower = adapt_thing(Path(folder))
    numbers = {"resolution": larger, "thing": thing}
    logger.info("%s", json.dumps(numbers, indent=1))
    grid([*upper, *lower], COLUMNS).save(DOCS / "adapting.jpg", quality=90)
    (DOCS / "adapting.md").write_text(page(numbers), encoding="utf-8")


if __name__ == "__main__":
    main()
