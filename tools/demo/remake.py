"""Regenerates everything that depends on the shipped weights: `python -m tools.demo.remake`.

That is the evaluations (`evaluation.json`, `evaluation_v1.json` and the tables of docs/demo.md), the image grids, the
preview factors, the LoRA of the LoRA workflow, and the training curves. Then run
`python -m tools.comfyui.workflow_pictures`, which regenerates the workflows' pictures in ComfyUI.
"""

from __future__ import annotations

import json
import logging
import random
import textwrap
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from wuerstchen_core.demo.artwork import CANVAS
from wuerstchen_core.demo.vocabulary import SHAPES, SIMPLE, Scene, caption
from wuerstchen_core.inference.pipeline import WuerstchenPipeline
from wuerstchen_core.models.prior import latents_from_features
from wuerstchen_core.training.data.demo import DemoDataset
from wuerstchen_core.training.stages.networks import encode_features, encode_latents

from .. import DOCS, ROOT, markdown_table
from . import curves, edits, lora, second_eye, steps, steps_trials
from .build import LOGS
from .build_v1 import EVALUATION as EVALUATION_V1
from .evaluate import SEVERAL, evaluate, generate, held_out_scenes, subset

logger = logging.getLogger(__name__)

PAGE = DOCS / "demo.md"
DEMO = ROOT / "wuerstchen_core" / "demo"
GRID = DOCS / "held_out.webp"
RANDOM_GRID = DOCS / "random.webp"
EVALUATION = LOGS.parent / "evaluation.json"
MARKS = "<!-- demo numbers: written by tools.demo.remake -->", "<!-- end of demo numbers -->"
MARKS_V1 = "<!-- v1 numbers: written by tools.demo.remake -->", "<!-- end of v1 numbers -->"
COLUMNS = 12  # of the grid, in squares
RANDOM, RANDOM_COLUMNS = 64, 8  # images of the random grid, and how many of them are in a row
TEXT_HEIGHT = 40  # pixels below an image of the random grid
GROUPS = {
    "by_place": "right thing at its position, {}",
    "by_shape": "right thing, complete and alone, {}",
    "by_side": "right thing, complete and alone, {0}x{0}",
    "pairs": "two things, {} right",
    "twice": "one thing twice, {} right",
    "thrice": "one thing three times, {} right",
    "trios": "three things, {} right",
}
SECOND_EYE = {"thing": "", "compressed": " after 42.67x compression", "stage_a": " after Stage A alone"}


def sample_grid(pipe: WuerstchenPipeline) -> Image.Image:
    """Generates held-out prompts: one row per layout, then one per shape other than square."""
    vocabulary = pipe.metadata["vocabulary"]
    layouts = vocabulary.get("layouts", SIMPLE)
    single = [layout for layout in layouts if layout not in SEVERAL]
    rows = [subset(found, COLUMNS) for layout in layouts if (found := held_out_scenes(pipe.metadata, [layout]))]
    for shape in vocabulary.get("shapes", ["square"])[1:]:
        count = COLUMNS * CANVAS // SHAPES[shape][0]
        rows.append(subset(held_out_scenes(pipe.metadata, single, shape), count))
    return edits.grid([generate(pipe, row, seed=1) for row in rows], COLUMNS)


def random_scenes(metadata: Mapping[str, Any], count: int = RANDOM) -> list[Scene]:
    """Returns random held-out scenes on squares; every layout is as likely. Always the same ones."""
    rng = random.Random("random held-out prompts")
    layouts = metadata["vocabulary"].get("layouts", SIMPLE)
    held_out = {layout: found for layout in layouts if (found := held_out_scenes(metadata, [layout]))}
    return [rng.choice(held_out[rng.choice(list(held_out))]) for _ in range(count)]


def random_grid(pipe: WuerstchenPipeline) -> Image.Image:
    """Generates random held-out prompts, each image above its prompt."""
    scenes = random_scenes(pipe.metadata)
    font = ImageFont.load_default(11)
    labelled = []
    for scene, image in zip(scenes, generate(pipe, scenes, seed=1), strict=True):
        both = Image.new("RGB", (edits.TILE, edits.TILE + TEXT_HEIGHT), "white")
        both.paste(edits.tile(image))
        text = "\n".join(textwrap.wrap(caption(scene), 21))
        ImageDraw.Draw(both).multiline_text((3, edits.TILE + 1), text, "black", font, spacing=1)
        labelled.append(both)
    rows = [labelled[start : start + RANDOM_COLUMNS] for start in range(0, RANDOM, RANDOM_COLUMNS)]
    return edits.grid(rows, RANDOM_COLUMNS)


def fit_factors(latents: Tensor, images: Tensor) -> dict[str, Any]:
    """Returns least-squares factors [c, 3] and bias [3] from latents [N, c, h, w] to colours in -1..1.

    images: [N, 3, H, W] in 0..1.
    """
    colours = torch.nn.functional.interpolate(images, size=latents.shape[-2:], mode="area") * 2 - 1
    rows = latents.permute(0, 2, 3, 1).flatten(0, 2)
    rows = torch.cat([rows, torch.ones(len(rows), 1)], dim=1)
    solution = torch.linalg.lstsq(rows, colours.permute(0, 2, 3, 1).flatten(0, 2)).solution
    rounded = [[round(value, 4) for value in row] for row in solution.tolist()]
    return {"factors": rounded[:-1], "bias": rounded[-1]}


def preview_factors(pipe: WuerstchenPipeline) -> dict[str, Any]:
    """Returns the factors for the latents that the samplers of Stages C and B work on."""
    assert pipe.image_encoder is not None and pipe.vqgan is not None
    dataset = DemoDataset(held_out=True)
    images = dataset.images(slice(None))
    features = dataset.map_images("features", partial(encode_features, pipe.image_encoder))(slice(None))
    latents = dataset.map_images("latents", partial(encode_latents, pipe.vqgan))(slice(None))
    return {"prior": fit_factors(latents_from_features(features), images), "decoder": fit_factors(latents, images)}


def number_table(numbers: dict[str, Any]) -> str:
    """Returns the table of an evaluation."""
    rows = {"right thing": numbers["thing"]}
    rows |= {f"right thing, {size}": rate for size, rate in numbers["by_size"].items()}
    if "own_colour" in numbers:
        rows["right thing, nearly of its background's colour"] = numbers["own_colour"]
    rows |= {"another thing instead": numbers["another_thing"], "right background": numbers["background"]}
    for group, label in GROUPS.items():
        rows |= {label.format(name): rate for name, rate in numbers.get(group, {}).items()}
    rows["right thing after 42.67x compression"] = numbers["compressed"]
    for name, found in numbers.get("second_eye", {}).items():
        label = f"right large thing{SECOND_EYE[name]}, by the second eye"
        rows |= {label: found["nearest"], f"{label}, among five": found["near"]}
    cells = [
        (name, f"{rate['percent']} %", f"{rate['interval'][0]} to {rate['interval'][1]} %", rate["count"])
        for name, rate in rows.items()
    ]
    psnr = numbers["psnr"]
    cells.append(("PSNR after compression", f"{psnr['mean']} dB", f"worst {psnr['min']} dB", psnr["count"]))
    return markdown_table(("On held-out prompts", "", "95 % interval", "images"), cells)


def replace_between(text: str, marks: tuple[str, str], content: str) -> str:
    """Returns `text` with `content` between the two marks. Raises ValueError unless each mark occurs once, in order."""
    start, end = marks
    if text.count(start) != 1 or text.count(end) != 1 or text.index(start) > text.index(end):
        raise ValueError(f"the page needs the lines {start} and {end}, once each and in this order")
    return text[: text.index(start)] + f"{start}\n{content}\n" + text[text.index(end) :]


def update_page(page: Path, marks: tuple[str, str], content: str) -> None:
    """Rewrites the part of a page between two marks."""
    page.write_text(replace_between(page.read_text(encoding="utf-8"), marks, content), encoding="utf-8")


def remake_numbers(pipe: WuerstchenPipeline, evaluation: Path, marks: tuple[str, str]) -> None:
    """Evaluates a model and writes its numbers to `evaluation` and their table to the page."""
    numbers = evaluate(pipe, second_eye=pipe.version == "v2")
    evaluation.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    update_page(PAGE, marks, number_table(numbers))
    logger.info("%s", number_table(numbers))


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for marks in (MARKS, MARKS_V1):  # checked before hours of work
        replace_between(PAGE.read_text(encoding="utf-8"), marks, "")
    second_eye.load_network()  # its packages too
    pipe = WuerstchenPipeline.load("demo")
    sample_grid(pipe).save(GRID, quality=80, method=6)
    random_grid(pipe).save(RANDOM_GRID, quality=80, method=6)
    edits.remake(pipe)
    (DEMO / "preview_factors.json").write_text(json.dumps(preview_factors(pipe), indent=1) + "\n", encoding="utf-8")
    remake_numbers(pipe, EVALUATION, MARKS)
    remake_numbers(WuerstchenPipeline.load("demo-v1"), EVALUATION_V1, MARKS_V1)
    lora.remake()
    curves.plot(LOGS, curves.PLOT)
    steps.write_page(steps_trials.stored_results())  # says if they are of earlier weights
    logger.info("now run `python -m tools.comfyui.workflow_pictures`, which needs a ComfyUI")


if __name__ == "__main__":
    main()
