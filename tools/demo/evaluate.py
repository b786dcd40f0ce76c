"""Evaluates a model on held-out prompts: `python -m tools.demo.evaluate [--json FILE]`.

Generates every held-out scene of one thing with each of three seeds, and checks the images with `judge.Judge`, which
has no trained parameters: in the centre of a square, and at the other positions, aspect ratios and sizes that the
model's metadata lists, of several things a sample. Also compresses the original drawings by 42.67 and decodes them.
With `--second-eye`, large things are also recognised by `second_eye.SecondEye`.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, cycle, groupby
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

from .judge import NOTHING, Judge, contrast, psnr, wilson_interval
from .second_eye import SecondEye

Judged = Sequence[tuple[Scene, Scene]]  # the requested scene, and the scene that the judge recognised

BATCH = 16
SAMPLE = 205  # scenes of a kind; all of one thing, since as many pairs of thing and background are held out
SEVERAL = {"pair": "pairs", "two": "twice", "three": "thrice", "trio": "trios"}  # layouts of several things
SEED, SAMPLE_SEED = 1000, 10_000
CONTRAST = 0.15  # OKLab; below it a thing has nearly the colour of its background
TOP = 5  # things that the second eye may find more similar for a near hit


def held_out_scenes(metadata: Mapping[str, Any], layouts: Sequence[str] = SIMPLE, shape: str = "square") -> list[Scene]:
    """Returns all scenes of the model's things whose (thing, background) pair was held out of training.

    metadata: of the bundle, which lists its things.
    """
    names = metadata.get("vocabulary", {}).get("things", [thing.name for thing in THINGS[:TRAINED_THINGS]])
    known = {index for index, thing in enumerate(THINGS) if thing.name in names}
    drawn = scenes(layouts, list(SHAPES).index(shape))
    return [scene for scene in drawn if known.issuperset(scene.things) and held_out(scene)]


def other_scenes(metadata: Mapping[str, Any], count: int = SAMPLE) -> dict[str, dict[str, list[Scene]]]:
    """Returns held-out scenes other than one thing in the centre of a square, if the model knows such.

    At most `count` for each position ("by_place"); for each layout of one thing in each shape ("by_shape") and on each
    larger square ("by_side", keyed by its side in pixels); and for each layout of several things in all shapes together
    (`SEVERAL`, keyed by shape).
    """
    vocabulary = metadata.get("vocabulary", {})
    layouts, shapes = vocabulary.get("layouts", SIMPLE), vocabulary.get("shapes", ["square"])
    single = [layout for layout in layouts if layout not in SEVERAL]
    groups: dict[str, dict[str, list[Scene]]] = {}

    def of_one(shape: str) -> list[Scene]:
        return [s for layout in single for s in subset(held_out_scenes(metadata, [layout], shape), count)]

    if "corner" in layouts:
        small = held_out_scenes(metadata, ["small", "corner"])
        groups["by_place"] = {
            name: subset([scene for scene in small if scene.position == position], count)
            for position, name in enumerate(POSITIONS)
        }
    if len(shapes) > 1:
        groups["by_shape"] = {shape: of_one(shape) for shape in shapes}
    if sides := vocabulary.get("larger"):
        groups["by_side"] = {str(side): of_one("square") for side in sides}
    for layout, group in SEVERAL.items():
        if layout in layouts:
            drawn = {shape: held_out_scenes(metadata, [layout], shape) for shape in shapes}
            groups[group] = {shape: subset(found, count // len(shapes)) for shape, found in drawn.items()}
    return groups


def subset(scenes: Sequence[Scene], count: int) -> list[Scene]:
    """Returns `count` of the scenes, always the same ones, or all if there are fewer."""
    return random.Random(0).sample(scenes, min(max(count, 1), len(scenes)))


@torch.inference_mode()
def generate(
    pipe: WuerstchenPipeline, scenes: Sequence[Scene], seed: int, canvas: int = CANVAS, **changes: Any
) -> list[Image.Image]:
    """Generates one image per scene with `canvas` pixels on the shorter side, in batches of one shape.

    Image i has seed `seed` + i.
    """
    images: list[Image.Image] = []
    for shape, group in groupby(scenes, lambda scene: scene.shape):
        width, height = (side * canvas // CANVAS for side in list(SHAPES.values())[shape])
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


@torch.inference_mode()
def reconstruct_by_stage_a(pipe: WuerstchenPipeline, scenes: Sequence[Scene]) -> list[Image.Image]:
    """Returns the drawings of scenes encoded and decoded by Stage A alone, without its codebook."""
    assert pipe.vqgan is not None
    images: list[Image.Image] = []
    for start in range(0, len(scenes), BATCH):
        pixels = torch.from_numpy(draw_all(scenes[start : start + BATCH])).permute(0, 3, 1, 2).float() / 255
        images += pipe.decode(pipe.vqgan.encode(pixels))
    return images


def rate(hits: Iterable[bool]) -> dict[str, Any]:
    """Returns the rate of hits in percent with its 95 % confidence interval."""
    hits = list(hits)
    low, high = wilson_interval(sum(hits), len(hits))
    percent = [round(100 * value, 1) for value in (sum(hits) / len(hits), low, high)]
    return {"percent": percent[0], "interval": percent[1:], "count": len(hits)}


def right_things(judged: Judged) -> list[int]:
    """Returns how many of a scene's one to three things each image shows at the right position."""
    return [sum(a == b for a, b in zip(scene.things, seen.things, strict=True)) for scene, seen in judged]


def _describe(scene: Scene) -> str:
    """Returns the caption, and the shape if it is not square."""
    shape = list(SHAPES)[scene.shape]
    return caption(scene) + (f" ({shape})" if scene.shape else "")


def _describe_mistake(scene: Scene, seen: Scene) -> str:
    names = ["nothing" if thing == NOTHING else THINGS[thing].name for thing in seen.things]
    return f"{_describe(scene)}: {' and '.join(names)}"


def own_colour(scene: Scene) -> bool:
    """True if the thing of a scene has nearly the colour of its background."""
    return contrast(scene.thing, scene.colour) < CONTRAST


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
    if own := [row for row in judged if own_colour(row[0])]:
        numbers["own_colour"] = rate(map(bool, right_things(own)))
    for group in ("by_place", "by_shape", "by_side"):
        if group in others:
            numbers[group] = {name: rate(map(bool, right_things(part))) for name, part in others[group].items()}
    for layout, group in SEVERAL.items():
        if group in others:
            rows = list(chain(*others[group].values()))
            counts = right_things(rows)
            complete = [count == len(scene.things) for count, (scene, _) in zip(counts, rows, strict=True)]
            numbers[group] = {
                "both" if layout == "pair" else "all": rate(complete),
                "one": rate(count == 1 for count in counts),
            }
    return numbers | {
        "compressed": rate(map(bool, right_things(compressed))),
        "psnr": {"mean": round(statistics.mean(psnrs), 2), "min": round(min(psnrs), 2), "count": len(psnrs)},
        "mistakes": [_describe_mistake(*row) for row in every if row[0].things != row[1].things],
        "backgrounds_missed": [_describe(scene) for scene, seen in every if scene.colour != seen.colour],
    }


def evaluate(
    pipe: WuerstchenPipeline, seeds: int = 3, every: int = 1, second_eye: bool = False, **changes: Any
) -> dict[str, Any]:
    """Returns all numbers of a model.

    every: use only every N-th held-out (thing, background) pair, and proportionally smaller samples of other scenes.
    second_eye: also let the second eye recognise large things. ValueError if its packages are missing.
    changes: arguments of `generate`.
    """
    eye = SecondEye() if second_eye else None
    scenes = [s for index, s in enumerate(held_out_scenes(pipe.metadata)) if index // len(SIZES) % every == 0]
    images = [image for seed in range(1, seeds + 1) for image in generate(pipe, scenes, SEED * seed, **changes)]
    others = {
        group: {
            name: judge_scenes(pipe, part, seeds, int(name) if group == "by_side" else CANVAS, **changes)
            for name, part in tqdm(parts.items(), desc=group)
        }
        for group, parts in other_scenes(pipe.metadata, max(SAMPLE // every, 1)).items()
    }
    judge = Judge()
    reconstructed, psnrs = reconstruct(pipe, scenes, **changes)
    compressed = judge_images(judge, scenes, reconstructed)
    numbers = summary(judge_images(judge, scenes * seeds, images), compressed, psnrs, others)
    if eye:
        rows = {"thing": images, "compressed": reconstructed, "stage_a": reconstruct_by_stage_a(pipe, scenes)}
        numbers["second_eye"] = {name: similarity(eye, scenes, row) for name, row in rows.items()}
    return numbers


def judge_scenes(pipe: WuerstchenPipeline, scenes: Sequence[Scene], seeds: int, canvas: int, **changes: Any) -> Judged:
    """Generates scenes with several seeds and `canvas` pixels on the shorter side, and judges them."""
    judge = Judge(canvas)
    rows: list[tuple[Scene, Scene]] = []
    for seed in range(1, seeds + 1):
        rows += judge_images(judge, scenes, generate(pipe, scenes, SAMPLE_SEED * seed, canvas, **changes))
    return rows


def similarity(eye: SecondEye, scenes: Sequence[Scene], images: Sequence[Image.Image]) -> dict[str, Any]:
    """Returns how often the second eye finds a large thing the most similar one, and one of the five most similar.

    images: one or several times all scenes.
    """
    shown = zip(cycle(scenes), images, strict=False)
    large = [(scene, np.asarray(image)) for scene, image in shown if scene.layout == "large"]
    ranks = eye.ranks([scene for scene, _ in large], [image for _, image in large])
    return {"nearest": rate(rank == 0 for rank in ranks), "near": rate(rank < TOP for rank in ranks)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Evaluates a model and prints the numbers as JSON."""
    parser = argparse.ArgumentParser(prog="python -m tools.demo.evaluate", description=__doc__)
    parser.add_argument("--model", default="demo", help="bundle to evaluate (default: demo)")
    parser.add_argument("--seeds", type=int, default=3, help="images per scene (default: 3)")
    parser.add_argument("--every", type=int, default=1, help="use only every N-th held-out (thing, background) pair")
    parser.add_argument("--second-eye", action="store_true", help="also recognise large things by EfficientNet-lite0")
    parser.add_argument("--schedule", help="of Stage C")
    parser.add_argument("--prior-steps", type=int)
    parser.add_argument("--prior-guidance", type=float)
    parser.add_argument("--decoder-steps", type=int)
    parser.add_argument("--json", type=Path, help="also write the numbers to a file")
    options = vars(parser.parse_args(arguments))
    target, pipe = options.pop("json"), WuerstchenPipeline.load(options.pop("model"))
    try:
        text = json.dumps(evaluate(pipe, **options), indent=1)
    except ValueError as error:
        parser.error(str(error))
    sys.stdout.write(text + "\n")
    if target:
        target.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
