"""Measures how much training it takes to adapt the shipped model: `python -m tools.demo.adapt`.

Fine-tunes Stage C for a new resolution, and trains LoRAs for three new objects from twelve images each with a
regularisation set, and one without. Writes docs/adapting.md and its grid of images.
"""

from __future__ import annotations

import json
import logging
import tempfile
import time
from collections.abc import Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

from PIL import Image

from wuerstchen_core.checkpoints import load_prior
from wuerstchen_core.cli.main import main as command_line
from wuerstchen_core.common.text import listed
from wuerstchen_core.common.toml import toml_value
from wuerstchen_core.demo.artwork import CANVAS, draw
from wuerstchen_core.demo.vocabulary import (
    COLOURS,
    SIZES,
    THINGS,
    TRAINED_THINGS,
    Scene,
    Thing,
    caption,
    held_out,
    scenes,
)
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
NEW_THINGS = THINGS[TRAINED_THINGS:]  # no shipped model was trained on them
LARGER = 384  # pixels
JUDGED = 48  # held-out images at the new resolution
JUDGED_KNOWN = 192  # held-out images of known things, with and without a LoRA
TRAINING_BACKGROUNDS = 6  # of the twelve images; the other backgrounds are judged
REGULARISATION = 256  # images of the regularisation set
BATCH = 8
SEEDS = 6  # images judged per scene of a new thing
COLUMNS = 8  # of the grid
Images = list[Image.Image]
Result = tuple[dict[str, Any], Images]  # rate of right things, and the images
Comparison = tuple[dict[str, Any], list[Images]]  # numbers before and after, and a row of images for each


def measure(pipe: WuerstchenPipeline, scenes: Sequence[Scene], size: int = CANVAS) -> Result:
    """Generates and judges squares of `size` pixels."""
    images: Images = []
    for start in range(0, len(scenes), BATCH):
        prompts = [caption(scene) for scene in scenes[start : start + BATCH]]
        images += pipe.generate(prompts, seed=start, width=size, height=size)
    return rate(map(bool, right_things(judge_images(Judge(size), scenes, images)))), images


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
    return {"before": before, "after": after, "seconds": seconds}, [first[:COLUMNS], second[:COLUMNS]]


def write_twelve_images(folder: Path, thing: Thing) -> list[Scene]:
    """Writes drawings of a thing with captions; returns the scenes on the other backgrounds."""
    folder.mkdir(parents=True, exist_ok=True)
    index, others = THINGS.index(thing), []
    for colour, name in enumerate(COLOURS):
        for size, word in enumerate(SIZES):
            scene = Scene(index, colour, size)
            if colour >= TRAINING_BACKGROUNDS:
                others.append(scene)
                continue
            draw(scene).save(folder / f"{word}-{name}.png")
            (folder / f"{word}-{name}.txt").write_text(caption(scene), encoding="utf-8")
    return others


def generate_known_images(folder: Path) -> int:
    """Generates a regularisation set: images of known things that are not judged. Returns the core-seconds it took."""
    trained = [scene for scene in scenes() if scene.thing < TRAINED_THINGS and not held_out(scene)]
    prompts = folder.with_suffix(".txt")
    prompts.write_text("\n".join(map(caption, subset(trained, REGULARISATION))), encoding="utf-8")
    start = time.process_time()
    command_line(["generate", "--prompts", str(prompts), "--output", str(folder), "--batch", str(BATCH)])
    return round(time.process_time() - start)


def adapt_things(folder: Path) -> Comparison:
    """Trains LoRAs for the new things with a regularisation set, the first also alone; also measures known things."""
    pipe = WuerstchenPipeline.load("demo")
    known_scenes = subset(held_out_scenes(pipe.metadata), JUDGED_KNOWN)
    numbers: dict[str, Any] = {"known": measure(pipe, known_scenes)[0]}
    numbers["seconds"] = generate_known_images(folder / "known")
    regularisation = {"source": str(folder / "known"), "regularisation": True}
    rows: list[list[Images]] = [[], []]  # images of each new thing, before and after
    for thing in NEW_THINGS:
        own = folder / thing.name
        new_scenes = write_twelve_images(own / "pictures", thing) * SEEDS
        before, images = measure(pipe, new_scenes)
        numbers[thing.name] = {"before": before}
        rows[0].append(images)
        for name, others in ("alone", []), ("regularised", [regularisation]):
            if name == "alone" and thing != NEW_THINGS[0]:
                continue
            sources = toml_value([{"source": str(own / "pictures")}, *others])
            overrides = [f"run={toml_value(str(own / name))}", f"data.sources={sources}"]
            lora, seconds = train("lora", THING_CONFIG, overrides)
            adapted = WuerstchenPipeline.load("demo", lora=lora)
            (new, images), (known, _) = measure(adapted, new_scenes), measure(adapted, known_scenes)
            numbers[thing.name][name] = {"new": new, "known": known, "seconds": seconds}
        rows[1].append(images)
    return numbers, [list(islice(chain.from_iterable(zip(*row, strict=True)), COLUMNS)) for row in rows]


def page(numbers: Mapping[str, Any]) -> str:
    """Returns docs/adapting.md."""
    larger, things = numbers["resolution"], numbers["things"]
    row = [larger["after"]["count"], larger["seconds"], _percent(larger["before"]), _percent(larger["after"])]
    resolution = markdown_table(("images", "core-seconds", "before", "after"), [row], 4)
    rows = []
    for name in (thing.name for thing in NEW_THINGS):
        for key, data in ("alone", "twelve images"), ("regularised", "and the regularisation set"):
            if part := things[name].get(key):
                rates = [things[name]["before"], part["new"], things["known"], part["known"]]
                rows.append([name, data, part["seconds"], *map(_percent, rates)])
    titles = ("New thing", "trained on", "core-seconds", "new: before", "after", "known: before", "after")
    return TEMPLATE.read_text("utf-8").format(
        size=LARGER,
        names=listed([f'"{thing.name}"' for thing in NEW_THINGS]),
        resolution=resolution,
        things=markdown_table(titles, rows, 5),
        new=things[NEW_THINGS[0].name]["before"]["count"],
        known=things["known"]["count"],
        regularisation=REGULARISATION,
        seconds=things["seconds"],
    )


def _percent(part: Mapping[str, Any]) -> str:
    return f"{part['percent']} %"


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with tempfile.TemporaryDirectory() as folder:  # so that no earlier training is resumed
        larger, upper = adapt_resolution(Path(folder))
        things, lower = adapt_things(Path(folder))
    numbers = {"resolution": larger, "things": things}
    logger.info("%s", json.dumps(numbers, indent=1))
    grid([*upper, *lower], COLUMNS).save(DOCS / "adapting.webp", quality=80, method=6)
    (DOCS / "adapting.md").write_text(page(numbers), encoding="utf-8")


if __name__ == "__main__":
    main()
