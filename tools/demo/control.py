"""Measures a ControlNet of the demo: the shape and place of what is generated, and whether it is the right thing.

Held-out scenes are drawn with their things moved a little, and in random sizes at random places, which the net's hint
shows and the caption does not. For the judge, each thing is cut out and scaled to where it looks for one. The drawings
after the 42.67x compression and back are judged, too: no ControlNet can be better than that.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from wuerstchen_core import Hint, WuerstchenPipeline
from wuerstchen_core.checkpoints import load_control_net
from wuerstchen_core.common.geometry import Box
from wuerstchen_core.demo.artwork import CANVAS, boxes, draw_all, overlapping, random_boxes
from wuerstchen_core.demo.vocabulary import SIZES, Scene, caption
from wuerstchen_core.inference.images import to_pixels
from wuerstchen_core.models.control_net import ControlNet
from wuerstchen_core.training.data.hints import contours, draw_boxes, silhouettes, widened

from .evaluate import held_out_scenes, rate
from .judge import Judge

LINE = 2.0  # width of an outline's lines
KINDS = ("outline", "silhouette", "boxes")
SHIFT, SCALES = 0.08, (0.85, 1.15)  # of things that are moved a little: most of the canvas, and of their size


def moved_boxes(scene: Scene, canvas: int, rng: random.Random) -> list[Box]:
    """Returns squares near the usual places of the things in a scene, which do not overlap."""
    while True:
        found: list[Box] = []
        for left, top, width, _ in boxes(scene, canvas):
            edge = round(width * rng.uniform(*SCALES))
            x, y = (round(start + (width - edge) / 2 + rng.uniform(-SHIFT, SHIFT) * canvas) for start in (left, top))
            found.append((min(max(0, x), canvas - edge), min(max(0, y), canvas - edge), edge, edge))
        if not any(overlapping(*two) for two in combinations(found, 2)):
            return found


PLACES: Mapping[str, Callable[[Scene, int, random.Random], list[Box]]] = {
    "moved": moved_boxes,
    "anywhere": random_boxes,
}


def placed_scenes(
    metadata: Mapping[str, Any], kind: str, count: int, places: str = "anywhere"
) -> tuple[list[Scene], list[list[Box]]]:
    """Returns held-out scenes of things that a model knows, two for boxes, and the boxes of their things."""
    rng = random.Random(f"control {kind}")
    found = held_out_scenes(metadata, ["pair" if kind == "boxes" else "large"])
    chosen = rng.sample(found, min(count, len(found)))
    return chosen, [PLACES[places](scene, CANVAS, rng) for scene in chosen]


def hints_of(kind: str, drawings: Tensor, placed: Sequence[Sequence[Box]]) -> Tensor:
    """Returns the hints [N, 3, H, W] of drawings [N, 3, H, W] in [0, 1]."""
    if kind == "boxes":
        return draw_boxes(placed, (drawings.shape[-2], drawings.shape[-1]))
    shapes = widened(contours(drawings), LINE) if kind == "outline" else silhouettes(drawings)
    return shapes.expand(-1, 3, -1, -1)


def overlap(one: Tensor, other: Tensor) -> float:
    """Returns the intersection over union of two white shapes."""
    one, other = one > 0.5, other > 0.5
    return float((one & other).sum() / (one | other).sum().clamp(min=1))


def background(image: Image.Image) -> tuple[int, ...]:
    """Returns the median colour of the border above and below."""
    border = np.concatenate([np.asarray(image)[0], np.asarray(image)[-1]])
    return tuple(int(value) for value in np.median(border, axis=0))


def at_usual_place(image: Image.Image, box: Box, scene: Scene) -> np.ndarray:
    """Returns an image in which the thing in a box is where the judge looks for that of a scene of one thing."""
    [(left, top, edge, _)] = boxes(scene)
    scale = box[2] / edge
    x, y = box[0] - left * scale, box[1] - top * scale
    area = (x, y, x + image.width * scale, y + image.height * scale)
    method, resample = Image.Transform.EXTENT, Image.Resampling.BILINEAR
    return np.asarray(image.transform(image.size, method, area, resample, fillcolor=background(image)))


def nearest_size(edge: int) -> int:
    """Returns the index of the size that is nearest to the edge of a box: scaled more, things would be blurred."""
    return min(range(len(SIZES)), key=lambda size: abs(math.log(edge / list(SIZES.values())[size])))


def right(judge: Judge, image: Image.Image, scene: Scene, placed: Sequence[Box]) -> bool:
    """True if each box of an image shows its thing; what is in the other boxes is covered."""
    for thing, box in zip(scene.things, placed, strict=True):
        one, alone = scene._replace(thing=thing, other=None, size=nearest_size(box[2])), image.copy()
        for left, top, width, height in placed:
            if (left, top, width, height) != box:
                alone.paste(background(image), (left, top, left + width, top + height))
        if judge.identify(at_usual_place(alone, box, one), one).thing != thing:
            return False
    return True


def measure(pipe: WuerstchenPipeline, file: str, count: int, seeds: int) -> dict[str, Any]:
    """Returns the numbers of a ControlNet: with its hints, and without them in the same scenes."""
    net = load_control_net(file)
    kind = net.params.hints
    if kind not in KINDS:
        raise ValueError(f"{file} reads hints of the kind {kind}: give a ControlNet of {', '.join(KINDS)}")
    pipe.progress = False
    found: dict[str, Any] = {"hints": kind, "seeds": seeds}
    for places in PLACES:
        found[places] = measure_places(pipe, net, *placed_scenes(pipe.metadata, kind, count, places), seeds)
    return found


def measure_places(
    pipe: WuerstchenPipeline, net: ControlNet, chosen: Sequence[Scene], placed: Sequence[list[Box]], seeds: int
) -> dict[str, Any]:
    """Returns the numbers of scenes without and with their hints, and of their drawings after the compression."""
    drawn = draw_all(chosen, CANVAS, placed)
    drawings = torch.from_numpy(drawn).permute(0, 3, 1, 2).float() / 255
    hints, targets, judge = hints_of(net.params.hints, drawings, placed), silhouettes(drawings), Judge()
    found: dict[str, Any] = {}
    for name in ("without", "with", "compressed"):
        overlaps, hits = [], []
        for number, scene in enumerate(tqdm(chosen, desc=name)):
            control = Hint(net, hints[number : number + 1]) if name == "with" else None
            shown = boxes(scene) if name == "without" and scene.other is None else placed[number]
            if name == "compressed":
                images = pipe.reconstruct(Image.fromarray(drawn[number]))
            else:
                images = pipe.generate(caption(scene), seed=list(range(seeds)), count=seeds, control=control)
            for image in images:
                overlaps.append(overlap(silhouettes(to_pixels(image)), targets[number : number + 1]))
                hits.append(right(judge, image, scene, shown))
        shape = {"mean": round(float(np.mean(overlaps)), 3), "tenth": round(float(np.quantile(overlaps, 0.1)), 3)}
        found[name] = {"overlap": shape, "right": rate(hits)}
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures a ControlNet and prints the numbers as JSON."""
    parser = argparse.ArgumentParser(prog="python -m tools.demo.control", description=__doc__)
    parser.add_argument("net", help="ControlNet of the demo, for outline, silhouette or boxes")
    parser.add_argument("--model", default="demo", help="bundle that it steers (default: demo)")
    parser.add_argument("--scenes", type=int, default=200, help="held-out scenes of each kind of places (default: 200)")
    parser.add_argument("--seeds", type=int, default=3, help="images per scene (default: 3)")
    options = parser.parse_args(arguments)
    numbers = measure(WuerstchenPipeline.load(options.model), options.net, options.scenes, options.seeds)
    sys.stdout.write(json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    main()
