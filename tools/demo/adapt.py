"""What little training adapts the shipped model to: `python -m tools.demo.adapt`.

A resolution that it has not seen, by Stage C alone, and a thing that it has not seen, by a LoRA from twelve pictures:
minutes each. Writes docs/adapting.md and its sheet.
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

from .edits import tiled
from .evaluate import held_out_scenes, judge_pictures, share, some, things_right
from .judge import Judge

logger = logging.getLogger(__name__)

RECIPE, DOCS = Path(__file__).parent, Path(__file__).parents[2] / "docs"
LARGER = 384  # pixels
JUDGED = 48  # held-out pictures at the new resolution, and beside the LoRA
SEEN = 6  # backgrounds of the twelve pictures; the others are asked for
BATCH = 8  # pictures that are painted at once
SEEDS = 6  # pictures of each scene of the new thing that are judged
COLUMNS = 8  # of the sheet
NEW_THING = THINGS[-1]  # no shipped model was trained on it
Shown = tuple[dict[str, Any], list[Image.Image]]  # the share of right things, and the first pictures


def painted(pipe: WuerstchenPipeline, wanted: Sequence[Scene], side: int = CANVAS, **told: Any) -> Shown:
    """Squares of `side` pixels judged."""
    images: list[Image.Image] = []
    for start in range(0, len(wanted), BATCH):
        prompts = [caption(scene) for scene in wanted[start : start + BATCH]]
        images += pipe.generate(prompts, seed=start, width=side, height=side, **told)
    rows = judge_pictures(Judge(side), wanted, images)
    return share(map(bool, things_right(rows))), images[:COLUMNS]


def resolution(folder: Path) -> tuple[dict[str, Any], list[list[Image.Image]]]:
    """Numbers and rows of pictures before and after Stage C has learnt larger pictures."""
    pipe = WuerstchenPipeline.load("demo")
    wanted = some(held_out_scenes(pipe.metadata), JUDGED)
    before, first = painted(pipe, wanted, LARGER)
    began = time.process_time()
    pipe.prior = load_prior(run("prior", RECIPE / "resolution.toml", [f"run='{folder}'"]))
    seconds = time.process_time() - began
    after, second = painted(pipe, wanted, LARGER)
    return {"before": before, "after": after, "seconds": round(seconds)}, [first, second]


def twelve_pictures(folder: Path) -> list[Scene]:
    """Write the new thing on some backgrounds, large and small, each with its caption; the scenes that are left."""
    folder.mkdir(parents=True, exist_ok=True)
    thing, left = THINGS.index(NEW_THING), []
    for colour, name in enumerate(COLOURS):
        for size, word in enumerate(SIZES):
            scene = Scene(thing, colour, size)
            if colour >= SEEN:
                left.append(scene)
                continue
            draw(scene).save(folder / f"{word}-{name}.png")
            (folder / f"{word}-{name}.txt").write_text(caption(scene), encoding="utf-8")
    return left


def new_thing(folder: Path) -> tuple[dict[str, Any], list[list[Image.Image]]]:
    """Numbers and rows of pictures before and after a LoRA has learnt a thing: of it, and of what the model knew."""
    asked = twelve_pictures(folder / "pictures") * SEEDS
    pipe = WuerstchenPipeline.load("demo")
    others = some(held_out_scenes(pipe.metadata), JUDGED)
    (before, first), (known, _) = painted(pipe, asked), painted(pipe, others)
    source = json.dumps(str(folder / "pictures"))
    began = time.process_time()
    lora = run("lora", RECIPE / "new_thing.toml", [f"run='{folder}'", f"data.source={source}"])
    seconds = time.process_time() - began
    pipe = WuerstchenPipeline.load("demo", lora=lora)
    (after, second), (kept, _) = painted(pipe, asked), painted(pipe, others)
    numbers = {"before": before, "after": after, "known": known, "kept": kept, "seconds": round(seconds)}
    return numbers, [first, second]


TEXT = """# Adapting the shipped model

Stage C decides what a picture shows, on latents 42 times smaller; Stages B and A draw what it decided. To adapt
Würstchen is to train Stage C, or a LoRA of it. This page is written by `python -m tools.demo.adapt`,
and measured for the shipped demo. What a training takes is in seconds of one core.

![Before and after, twice](adapting.jpg)

*Rows 1 and 2: {larger}x{larger} pixels asked of the shipped model, and after Stage C has learnt them. Rows 3 and 4:
"{new}" before and after a LoRA. All pairs of thing and background are held out.*

| The right thing | pictures | core-seconds | before | after |
|---|---:|---:|---:|---:|
{rows}

The first is `train prior` with `start = "demo"` (`resolution.toml` beside the recipes); Stages A and B, the text tower
and the encoder are as they ship. The second is `train lora` with `new_thing.toml`: twelve pictures and their captions
in a folder, as anyone's would be, on six backgrounds; the other two are asked for. Its last row says what the LoRA, at
full strength, leaves of what the model knew. [Training](training.md) says what else there is.
"""


def page(numbers: Mapping[str, Any]) -> str:
    """docs/adapting.md."""

    def line(name: str, part: Mapping[str, Any], before: str, after: str) -> str:
        shares = [f"{part[key]['percent']} %" for key in (before, after)]
        return " | ".join([f"| {name}", str(part[after]["count"]), str(part["seconds"]), *shares]) + " |"

    rows = [
        line(f"at {LARGER}x{LARGER} pixels", numbers["resolution"], "before", "after"),
        line(f"{NEW_THING.name}, from twelve pictures", numbers["thing"], "before", "after"),
        line("what it knew, without and with that LoRA", numbers["thing"], "known", "kept"),
    ]
    return TEXT.format(larger=LARGER, new=NEW_THING.name, rows="\n".join(rows))


def main() -> None:
    """Train both, and write what came of it."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with tempfile.TemporaryDirectory() as folder:  # so that nothing goes on from what another model was adapted to
        larger, upper = resolution(Path(folder))
        thing, lower = new_thing(Path(folder))
    numbers = {"resolution": larger, "thing": thing}
    logger.info("%s", json.dumps(numbers, indent=1))
    tiled([*upper, *lower], COLUMNS).save(DOCS / "adapting.jpg", quality=90)
    (DOCS / "adapting.md").write_text(page(numbers), encoding="utf-8")


if __name__ == "__main__":
    main()
