"""Measure a model on the held-out pictures: `python -m tools.demo.evaluate [--json FILE]`.

Every held-out scene of one thing in the middle of a square is painted with each of three seeds and judged by
`judge.Judge`, which looks at pixels and is no trained network; every such picture is sent through the 42.67x
bottleneck, judged and compared. Of a model that knows more, by its metadata, a sample of held-out scenes is painted and
judged for each place, each shape and of two things.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from wuerstchen_core.demo.artwork import CANVAS, draw_all
from wuerstchen_core.demo.vocabulary import (
    POSITIONS,
    SHAPES,
    SIMPLE,
    SIZES,
    THINGS,
    TRAINED_THINGS,
    Scene,
    caption,
    held_out,
    scenes,
)
from wuerstchen_core.inference.pipeline import WuerstchenPipeline
from wuerstchen_core.models.image_encoder import semantic_view

from .judge import NOTHING, Judge, psnr, wilson_interval

Rows = Sequence[tuple[Scene, Scene]]  # what was asked and what is seen

BATCH = 16
SAMPLE = 60  # scenes of each place, of each shape and of two things
SAMPLE_SEED = 10_000  # of their pictures


def held_out_scenes(metadata: Mapping[str, Any], layouts: Sequence[str] = SIMPLE, shape: str = "square") -> list[Scene]:
    """All scenes whose (thing, background) pair training never saw; of the things that a bundle's `metadata` names."""
    names = metadata.get("vocabulary", {}).get("things", [thing.name for thing in THINGS[:TRAINED_THINGS]])
    known = {index for index, thing in enumerate(THINGS) if thing.name in names}
    drawn = scenes(layouts, list(SHAPES).index(shape))
    return [scene for scene in drawn if known.issuperset(scene.things) and held_out(scene)]


def further_scenes(metadata: Mapping[str, Any], count: int = SAMPLE) -> dict[str, dict[str, list[Scene]]]:
    """Samples of held-out scenes of what a model knows besides one thing in the middle of a square.

    About `count` for each of the places ("by_place"), each of the shapes ("by_shape") and of two things ("pairs", by
    their shape); all layouts of one thing alike in "by_shape".
    """
    vocabulary = metadata.get("vocabulary", {})
    layouts, shapes = vocabulary.get("layouts", SIMPLE), vocabulary.get("shapes", ["square"])
    alone = [layout for layout in layouts if layout != "pair"]
    found: dict[str, dict[str, list[Scene]]] = {}
    if "corner" in layouts:
        small = held_out_scenes(metadata, ["small", "corner"])
        places = {name: [scene for scene in small if scene.position == place] for place, name in enumerate(POSITIONS)}
        found["by_place"] = {name: some(these, count) for name, these in places.items()}
    if len(shapes) > 1:
        found["by_shape"] = {
            shape: [
                scene
                for layout in alone
                for scene in some(held_out_scenes(metadata, [layout], shape), count // len(alone))
            ]
            for shape in shapes
        }
    if "pair" in layouts:
        found["pairs"] = {
            shape: some(held_out_scenes(metadata, ["pair"], shape), count // len(shapes)) for shape in shapes
        }
    return found


def some(these: Sequence[Scene], count: int) -> list[Scene]:
    """The same `count` of these scenes each time, or all where there are fewer."""
    return random.Random(0).sample(these, min(max(count, 1), len(these)))


@torch.inference_mode()
def paint(pipe: WuerstchenPipeline, wanted: Sequence[Scene], seed: int, **changes: Any) -> list[Image.Image]:
    """One picture of each scene, in batches of one shape; picture i has seed `seed` + i."""
    images: list[Image.Image] = []
    for shape, alike in groupby(wanted, lambda scene: scene.shape):
        width, height = list(SHAPES.values())[shape]
        prompts = [caption(scene) for scene in alike]
        for start in range(0, len(prompts), BATCH):
            batch = prompts[start : start + BATCH]
            images += pipe.generate(batch, seed=seed + len(images), width=width, height=height, **changes)
    return images


def judge_pictures(judge: Judge, wanted: Sequence[Scene], images: Sequence[Image.Image]) -> Rows:
    """For each picture: its scene, and that which the judge sees."""
    return [(scene, judge.identify(np.asarray(image), scene)) for scene, image in zip(wanted, images, strict=True)]


@torch.inference_mode()
def reconstruct(
    pipe: WuerstchenPipeline, wanted: Sequence[Scene], **changes: Any
) -> tuple[list[Image.Image], list[float]]:
    """Each scene's true picture after the 42.67x bottleneck (no text), and the PSNR of it in dB."""
    assert pipe.image_encoder is not None
    sampling = pipe.sampling.updated(width=CANVAS, height=CANVAS, **changes)
    images: list[Image.Image] = []
    values: list[float] = []
    for start in range(0, len(wanted), BATCH):
        truth = draw_all(wanted[start : start + BATCH])
        pixels = torch.from_numpy(truth).permute(0, 3, 1, 2).float() / 255
        features = pipe.image_encoder(semantic_view(pixels)).float()
        _, text = pipe.encode_text([""])
        painted = pipe.decode(pipe.sample_decoder(features, text.expand(len(truth), -1, -1), sampling, seed=0))
        values += [psnr(a, np.asarray(b)) for a, b in zip(truth, painted, strict=True)]
        images += painted
    return images, values


def share(hits: Iterable[bool]) -> dict[str, Any]:
    """A share in percent with its 95 % confidence interval."""
    hits = list(hits)
    low, high = wilson_interval(sum(hits), len(hits))
    percent = [round(100 * value, 1) for value in (sum(hits) / len(hits), low, high)]
    return {"percent": percent[0], "interval": percent[1:], "count": len(hits)}


def things_right(rows: Rows) -> list[int]:
    """How many of a scene's things, one or two, each picture shows where they belong."""
    return [sum(a == b for a, b in zip(asked.things, seen.things, strict=True)) for asked, seen in rows]


def shown(asked: Scene, seen: Scene) -> str:
    """A mistake in words."""
    names = [*(thing.name for thing in THINGS), "nothing"]
    found = " and ".join(names[thing] for thing in seen.things)
    return f"{told(asked)}: {found}"


def told(scene: Scene) -> str:
    """What was asked for, with the shape where it is no square."""
    return caption(scene) + (f" ({list(SHAPES)[scene.shape]})" if scene.shape else "")


def summary(
    rows: Rows, compressed: Rows, values: Sequence[float], further: Mapping[str, Mapping[str, Rows]] | None = None
) -> dict[str, Any]:
    """The numbers that the README quotes of what was painted and what was compressed; what was mistaken for what.

    `further`: rows of what `further_scenes` names.
    """
    further = further or {}
    sizes = {size: [row for row in rows if row[0].size == index] for index, size in enumerate(SIZES)}
    every = [*rows, *(row for group in further.values() for part in group.values() for row in part)]
    numbers: dict[str, Any] = {
        "thing": share(map(bool, things_right(rows))),
        "another_thing": share(seen.thing not in (asked.thing, NOTHING) for asked, seen in rows),
        "background": share(asked.colour == seen.colour for asked, seen in rows),
        "by_size": {size: share(map(bool, things_right(part))) for size, part in sizes.items() if part},
    }
    for group in ("by_place", "by_shape"):
        if group in further:
            numbers[group] = {name: share(map(bool, things_right(part))) for name, part in further[group].items()}
    if "pairs" in further:
        right = things_right(list(chain(*further["pairs"].values())))
        numbers["pairs"] = {"both": share(x == 2 for x in right), "one": share(x == 1 for x in right)}
    return numbers | {
        "compressed": share(map(bool, things_right(compressed))),
        "psnr": {"mean": round(statistics.mean(values), 2), "min": round(min(values), 2), "count": len(values)},
        "mistakes": [shown(*row) for row in every if row[0].things != row[1].things],
        "backgrounds_missed": [told(asked) for asked, seen in every if asked.colour != seen.colour],
    }


def evaluate(pipe: WuerstchenPipeline, seeds: int = 3, every: int = 1, **changes: Any) -> dict[str, Any]:
    """All numbers of a model, over every `every`-th held-out (thing, background) pair and samples that much smaller;
    `changes` go to `generate`."""
    held = held_out_scenes(pipe.metadata)
    wanted = [scene for index, scene in enumerate(held) if index // len(SIZES) % every == 0]
    judge = Judge()
    rows: list[tuple[Scene, Scene]] = []
    for seed in tqdm(range(seeds), desc="seeds"):
        rows += judge_pictures(judge, wanted, paint(pipe, wanted, 1000 * (seed + 1), **changes))
    further = {
        group: {
            name: judge_pictures(judge, these, paint(pipe, these, SAMPLE_SEED, **changes))
            for name, these in tqdm(parts.items(), desc=group)
        }
        for group, parts in further_scenes(pipe.metadata, SAMPLE // every).items()
    }
    images, values = reconstruct(pipe, wanted, **changes)
    return summary(rows, judge_pictures(judge, wanted, images), values, further)


def main(arguments: Sequence[str] | None = None) -> None:
    """Evaluate, and write the numbers as JSON."""
    parser = argparse.ArgumentParser(prog="python -m tools.demo.evaluate", description=__doc__)
    parser.add_argument("--model", default="demo", help="bundle to measure")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--every", type=int, default=1, help="take only every N-th held-out (thing, background) pair")
    parser.add_argument("--schedule", help="of Stage C: original, diffusers, fast or linear")
    parser.add_argument("--prior-steps", type=int)
    parser.add_argument("--prior-guidance", type=float)
    parser.add_argument("--decoder-steps", type=int)
    parser.add_argument("--json", type=Path, help="write the numbers here too")
    options = vars(parser.parse_args(arguments))
    target, pipe = options.pop("json"), WuerstchenPipeline.load(options.pop("model"))
    text = json.dumps(evaluate(pipe, **options), indent=1)
    sys.stdout.write(text + "\n")
    if target:
        target.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
