"""Remake what is derived from the shipped weights: `python -m tools.demo.remake`.

The evaluations' numbers (`evaluation.json` and `evaluation_v1.json` here, and the README's tables), the sheets of
pictures, the factors that turn latents into previews, the LoRA beside its workflow, and the training's curves. The
pictures beside the workflows need a ComfyUI: `python tools/comfyui/workflow_pictures.py` starts one.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from wuerstchen_core.demo.artwork import CANVAS
from wuerstchen_core.demo.vocabulary import SHAPES, SIMPLE
from wuerstchen_core.inference.pipeline import WuerstchenPipeline
from wuerstchen_core.models.prior import latents_from_features
from wuerstchen_core.training.data.demo import DemoDataset
from wuerstchen_core.training.stages.networks import encode_features, encode_latents

from . import curves, edits, lora
from .build import RECIPE
from .build_v1 import EVALUATION as EVALUATION_V1
from .evaluate import evaluate, held_out_scenes, paint, some

logger = logging.getLogger(__name__)

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "wuerstchen_core" / "demo"
SHEET = ROOT / "docs" / "held_out.jpg"
EVALUATION = Path(__file__).with_name("evaluation.json")
MARKS = "<!-- demo numbers: remade by tools.demo.remake -->", "<!-- end of demo numbers -->"
MARKS_V1 = "<!-- v1 numbers: remade by tools.demo.remake -->", "<!-- end of v1 numbers -->"
COLUMNS = 12  # of the sheet, of squares


def reference_sheet(pipe: WuerstchenPipeline) -> Image.Image:
    """Held-out prompts, painted: a row of each layout, then one of each shape that is no square."""
    vocabulary = pipe.metadata["vocabulary"]
    layouts = vocabulary.get("layouts", SIMPLE)
    alone = [layout for layout in layouts if layout != "pair"]
    rows = [some(held_out_scenes(pipe.metadata, [layout]), COLUMNS) for layout in layouts]
    for shape in vocabulary.get("shapes", ["square"])[1:]:
        count = COLUMNS * CANVAS // SHAPES[shape][0]
        rows.append(some(held_out_scenes(pipe.metadata, alone, shape), count))
    return edits.tiled([paint(pipe, row, seed=1) for row in rows], COLUMNS)


def fit_factors(latents: Tensor, images: Tensor) -> dict[str, Any]:
    """Least-squares factors [c, 3] and bias [3] from latents [N, c, h, w] to colours in -1..1.

    `images` [N, 3, H, W] are in 0..1, as the trainers have them.
    """
    colours = torch.nn.functional.interpolate(images, size=latents.shape[-2:], mode="area") * 2 - 1
    rows = latents.permute(0, 2, 3, 1).flatten(0, 2)
    rows = torch.cat([rows, torch.ones(len(rows), 1)], dim=1)
    solution = torch.linalg.lstsq(rows, colours.permute(0, 2, 3, 1).flatten(0, 2)).solution
    rounded = [[round(value, 4) for value in row] for row in solution.tolist()]
    return {"factors": rounded[:-1], "bias": rounded[-1]}


def preview_factors(pipe: WuerstchenPipeline) -> dict[str, Any]:
    """Factors for the latents that the samplers of Stage C and B work on."""
    assert pipe.image_encoder is not None and pipe.vqgan is not None
    pictures = DemoDataset(held_out=True)
    images = pictures.images(slice(None))
    features = pictures.map_images("features", partial(encode_features, pipe.image_encoder))(slice(None))
    latents = pictures.map_images("latents", partial(encode_latents, pipe.vqgan))(slice(None))
    return {"prior": fit_factors(latents_from_features(features), images), "decoder": fit_factors(latents, images)}


def number_table(numbers: dict[str, Any]) -> str:
    """The README's table."""

    def line(name: str, share: dict[str, Any]) -> str:
        low, high = share["interval"]
        return f"| {name} | {share['percent']} % | {low} to {high} % | {share['count']} |"

    def part(name: str) -> Iterable[tuple[str, dict[str, Any]]]:
        found: dict[str, dict[str, Any]] = numbers.get(name, {})  # not all models have it
        return found.items()

    psnr = numbers["psnr"]
    return "\n".join(
        [
            "| On held-out prompts | | 95 % interval | pictures |",
            "|---|---|---|---|",
            line("the right thing", numbers["thing"]),
            *(line(f"the right thing, {size}", share) for size, share in numbers["by_size"].items()),
            line("another thing", numbers["another_thing"]),
            line("the right background", numbers["background"]),
            *(line(f"the right thing in its place, {name}", share) for name, share in part("by_place")),
            *(line(f"the right thing, whole and alone, {name}", share) for name, share in part("by_shape")),
            *(line(f"two things, {name} right", share) for name, share in part("pairs")),
            line("the right thing after 42.67x compression", numbers["compressed"]),
            f"| the picture itself after it | {psnr['mean']} dB | worst {psnr['min']} dB | {psnr['count']} |",
        ]
    )


def with_table(text: str, table: str, marks: tuple[str, str] = MARKS) -> str:
    """A README with `table` between its two marks."""
    start, end = marks
    if text.count(start) != 1 or text.count(end) != 1 or text.index(start) > text.index(end):
        raise ValueError(f"the README has no place for the numbers: put {start} and {end} into it, once each")
    return text[: text.index(start)] + f"{start}\n{table}\n" + text[text.index(end) :]


def remake_numbers(pipe: WuerstchenPipeline, evaluation: Path, marks: tuple[str, str]) -> None:
    """Measure a model; write its numbers into `evaluation` and their table between the README's `marks`."""
    numbers, readme = evaluate(pipe), ROOT / "README.md"
    evaluation.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    table = number_table(numbers)
    readme.write_text(with_table(readme.read_text(encoding="utf-8"), table, marks), encoding="utf-8")
    logger.info("%s", table)


def main() -> None:
    """Remake it all."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    readme = ROOT / "README.md"
    for marks in (MARKS, MARKS_V1):
        with_table(readme.read_text(encoding="utf-8"), "", marks)  # before the hours of painting
    pipe = WuerstchenPipeline.load("demo")
    SHEET.parent.mkdir(exist_ok=True)
    reference_sheet(pipe).save(SHEET, quality=90)
    edits.remake(pipe)
    (DEMO / "preview_factors.json").write_text(json.dumps(preview_factors(pipe), indent=1) + "\n", encoding="utf-8")
    remake_numbers(pipe, EVALUATION, MARKS)
    remake_numbers(WuerstchenPipeline.load("demo-v1"), EVALUATION_V1, MARKS_V1)
    lora.remake(ROOT)
    curves.plot(RECIPE / "logs", curves.PLOT)
    logger.info("the workflows' pictures need a ComfyUI: now run python tools/comfyui/workflow_pictures.py")


if __name__ == "__main__":
    main()
