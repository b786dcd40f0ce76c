"""Evaluates a model on held-out prompts: `python -m tools.demo.evaluate [--json FILE]`.

Generates every held-out scene of one thing in the centre of a square with each of three seeds, and checks the images
with `judge.Judge`, which has no trained parameters. Also compresses the original drawings by 42.67 and decodes
them, and generates samples of the other positions, aspect ratios and pairs that the model's metadata lists.
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

Judged = Sequence[tuple[Scene, Scene]]  # the requested scene, and the scene that the judge recognised

BATCH = 16
SAMPLE = 60  # scenes per position, per shape, and of pairs
SAMPLE_SEED = 10_000


def held_out_scenes(metadata: Mapping[str, Any], layouts: Sequence[str] = SIMPLE, shape: str = "square") -> list[Scene]:
    """Returns all scenes of the model's things whose (thing, background) pair was held out of training.

    metadata: of the bundle, which lists its things.
    """
    names = metadata.get("vocabulary", {}).get("things", [thing.name for thing in THINGS[:TRAINED_THINGS]])
    known = {index for index, thing in enumerate(THINGS) if thing.name in names}
    drawn = scenes(layouts, list(SHAPES).index(shape))
    return [scene for scene in drawn if known.issuperset(scene.things) and held_out(scene)]


def other_scenes(metadata: Mapping[str, Any], count: int = SAMPLE) -> dict[str, dict[str, list[Scene]]]:
    """Returns samples of held-out scenes other than one thing in the centre of a square, if the model knows such.

    About `count` for each position ("by_place"), each shape ("by_shape", all layouts of one thing equally often), and
    of two things ("pairs", keyed by shape).
    """
    vocabulary = metadata.get("vocabulary", {})
    layouts, shapes = vocabulary.get("layouts", SIMPLE), vocabulary.get("shapes", ["square"])
    single = [layout for layout in layouts if layout != "pair"]
    groups: dict[str, dict[str, list[Scene]]] = {}
    if "corner" in layouts:
        small = held_out_scenes(metadata, ["small", "corner"])
        groups["by_place"] = {
            name: subset([scene for scene in small if scene.position == position], count)
            for position, name in enumerate(POSITIONS)
        }
    if len(shapes) > 1:
        per_layout = count // len(single)
        groups["by_shape"] = {
            shape: [s for layout in single for s in subset(held_out_scenes(metadata, [layout], shape), per_layout)]
            for shape in shapes
        }
    if "pair" in layouts:
        per_shape = count // len(shapes)
        groups["pairs"] = {shape: subset(held_out_scenes(metadata, ["pair"], shape), per_shape) for shape in shapes}
    return groups


def subset(scenes: Sequence[Scene], count: int) -> list[Scene]:
    """Returns `count` of the scenes, always the same ones, or all if there are fewer."""
    return random.Random(0).sample(scenes, min(max(count, 1), len(scenes)))


@torch.inference_mode()
def generate(pipe: WuerstchenPipeline, scenes: Sequence[Scene], seed: int, **changes: Any) -> list[Image.Image]:
    """Generates one image per scene, in batches of one shape; image i has seed `seed` + i."""
    images: list[Image.Image] = []
    for shape, group in groupby(scenes, lambda scene: scene.shape):
        width, height = list(SHAPES.values())[shape]
        prompts = [caption(scene) for scene in group]
        for start in range(0, len(prompts), BATCH):
            batch = prompts[start : start + BATCH]
            images += pipe.generate(batch, seed=seed + len(images), width=width, height=height, **changes)
    return images


def judge_images(judge: Judge, scenes: Sequence[Scene], images: Sequence[Image.Image]) -> Judged:
    """Returns each image's scene together with the scene that the judge recognises."""
    return [(scene, judge.identify(np.asarray(image), scene)) for scene, image in zip(scenes, images, strict=True)]


@torch.inference_mode()
def reconstruct(
    pipe: WuerstchenPipeline, scenes: Sequence[Scene], **changes: Any
) -> tuple[list[Image.Image], list[float]]:
    """Returns the drawings of scenes after the 42.67x compression, without text, and their PSNR in dB."""
    assert pipe.image_encoder is not None
    settings = pipe.sampling.updated(width=CANVAS, height=CANVAS, **changes)
    images: list[Image.Image] = []
    values: list[float] = []
    for start in range(0, len(scenes), BATCH):
        drawings = draw_all(scenes[start : start + BATCH])
        pixels = torch.from_numpy(drawings).permute(0, 3, 1, 2).float() / 255
        features = pipe.image_encoder(semantic_view(pixels)).float()
        _, text = pipe.encode_text([""])
        decoded = pipe.decode(pipe.sample_decoder(features, text.expand(len(drawings), -1, -1), settings, seed=0))
        values += [psnr(a, np.asarray(b)) for a, b in zip(drawings, decoded, strict=True)]
        images += decoded
    return images, values


def rate(hits: Iterable[bool]) -> dict[str, Any]:
    """Returns the rate of hits in percent with its 95 % confidence interval."""
    hits = list(hits)
    low, high = wilson_interval(sum(hits), len(hits))
    percent = [round(100 * value, 1) for value in (sum(hits) / len(hits), low, high)]
    return {"percent": percent[0], "interval": percent[1:], "count": len(hits)}


def right_things(judged: Judged) -> list[int]:
    """Returns how many of a scene's one or two things each image shows at the right position."""
    return [sum(a == b for a, b in zip(scene.things, seen.things, strict=True)) for scene, seen in judged]


def _describe(scene: Scene) -> str:
    """Returns the caption, and the shape if it is not square."""
    shape = list(SHAPES)[scene.shape]
    return caption(scene) + (f" ({shape})" if scene.shape else "")


def _describe_mistake(scene: Scene, seen: Scene) -> str:
    names = ["nothing" if thing == NOTHING else THINGS[thing].name for thing in seen.things]
    return f"{_describe(scene)}: {' and '.join(names)}"


def summary(
    judged: Judged, compressed: Judged, psnrs: Sequence[float], others: Mapping[str, Mapping[str, Judged]] | None = None
) -> dict[str, Any]:
    """Returns the rates of generated and of compressed images, and a list of mistakes.

    others: results of the scenes of `other_scenes`.
    """
    others = others or {}
    by_size = {size: [row for row in judged if row[0].size == index] for index, size in enumerate(SIZES)}
    every = [*judged, *(row for group in others.values() for part in group.values() for row in part)]
    numbers: dict[str, Any] = {
        "thing": rate(map(bool, right_things(judged))),
        "another_thing": rate(seen.thing not in (scene.thing, NOTHING) for scene, seen in judged),
        "background": rate(scene.colour == seen.colour for scene, seen in judged),
        "by_size": {size: rate(map(bool, right_things(part))) for size, part in by_size.items() if part},
    }
    for group in ("by_place", "by_shape"):
        if group in others:
            numbers[group] = {name: rate(map(bool, right_things(part))) for name, part in others[group].items()}
    if "pairs" in others:
        counts = right_things(list(chain(*others["pairs"].values())))
        numbers["pairs"] = {"both": rate(count == 2 for count in counts), "one": rate(count == 1 for count in counts)}
    return numbers | {
        "compressed": rate(map(bool, right_things(compressed))),
        "psnr": {"mean": round(statistics.mean(psnrs), 2), "min": round(min(psnrs), 2), "count": len(psnrs)},
        "mistakes": [_describe_mistake(*row) for row in every if row[0].things != row[1].things],
        "backgrounds_missed": [_describe(scene) for scene, seen in every if scene.colour != seen.colour],
    }


def evaluate(pipe: WuerstchenPipeline, seeds: int = 3, every: int = 1, **changes: Any) -> dict[str, Any]:
    """Returns all numbers of a model.

    every: use only every N-th held-out (thing, background) pair, and proportionally smaller samples of other scenes.
    changes: arguments of `generate`.
    """
    scenes = [s for index, s in enumerate(held_out_scenes(pipe.metadata)) if index // len(SIZES) % every == 0]
    judge = Judge()
    judged: list[tuple[Scene, Scene]] = []
    for seed in tqdm(range(seeds), desc="seeds"):
        judged += judge_images(judge, scenes, generate(pipe, scenes, 1000 * (seed + 1), **changes))
    others = {
        group: {
            name: judge_images(judge, part, generate(pipe, part, SAMPLE_SEED, **changes))
            for name, part in tqdm(parts.items(), desc=group)
        }
        for group, parts in other_scenes(pipe.metadata, SAMPLE // every).items()
    }
    images, psnrs = reconstruct(pipe, scenes, **changes)
    return summary(judged, judge_images(judge, scenes, images), psnrs, others)


def main(arguments: Sequence[str] | None = None) -> None:
    """Evaluates a model and prints the numbers as JSON."""
    parser = argparse.ArgumentParser(prog="python -m tools.demo.evaluate", description=__doc__)
    parser.add_argument("--model", default="demo", help="bundle to evaluate (default: demo)")
    parser.add_argument("--seeds", type=int, default=3, help="images per scene (default: 3)")
    parser.add_argument("--every", type=int, default=1, help="use only every N-th held-out (thing, background) pair")
    parser.add_argument("--schedule", help="of Stage C")
    parser.add_argument("--prior-steps", type=int)
    parser.add_argument("--prior-guidance", type=float)
    parser.add_argument("--decoder-steps", type=int)
    parser.add_argument("--json", type=Path, help="also write the numbers to a file")
    options = vars(parser.parse_args(arguments))
    target, pipe = options.pop("json"), WuerstchenPipeline.load(options.pop("model"))
    text = json.dumps(evaluate(pipe, **options), indent=1)
    sys.stdout.write(text + "\n")
    if target:
        target.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
