"""Retrain the shipped model from nothing: `python -m wuerstchen_core.demo.recipe.build [--run DIR]`.

The five stages train one after the other as the TOML files in this folder say, each going on where it was stopped,
and their weights become the bundle; the logs of what ships are kept in `logs`. What depends on the weights is then
remade by `remake`.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ...checkpoints import PARTS_OF, Part, demo_path, read_part, save_bundle
from ...checkpoints.rows import thinned
from ...checkpoints.sources import TOWERS
from ...models.text_encoder import tokenize
from ...tables import from_table
from ...training.config import read_config
from ...training.pictures import DataConfig
from ..vocabulary import COLOURS, SIZES, THINGS, known_words

RECIPE = Path(__file__).parent
STAGES = ("vqgan", "encoder", "text", "decoder", "prior")  # in this order: later ones need earlier ones
STAGE_OF_PART = {
    "vqgan": "vqgan",
    "image_encoder": "encoder",
    "decoder": "decoder",
    "token_decoder": "token-decoder",
    "prior": "prior",
}
# Guidance and steps that `evaluate` found to be enough for this model.
SAMPLING = {
    "width": 256,
    "height": 256,
    "schedule": "linear",
    "prior_steps": 20,
    "prior_guidance": 3.0,
    "decoder_steps": 12,
}
SINGLES = 512  # CLIP's first tokens: each byte, inside a word and at its end
LICENCE = "Weights: MIT. Trained on drawings of Google's Noto Emoji (Apache License 2.0), see ARTWORK-LICENSE.txt."


def trained_on(config: Path) -> DataConfig:
    """The pictures that a stage's TOML file names."""
    return from_table(DataConfig, read_config(config, []).get("data", {}), "data")


def vocabulary(data: DataConfig) -> dict[str, Any]:
    """What a model that was trained on these pictures can paint, for the bundle's metadata."""
    things = THINGS[: data.things]
    return {
        "words": known_words(things, data.layouts),
        "things": [thing.name for thing in things],
        "colours": list(COLOURS),
        "sizes": list(SIZES),
        "layouts": data.layouts,
        "shapes": data.shapes,
    }


def known_rows() -> set[int]:
    """The tokens that captions are made of, and all single letters and signs: the tower was trained on no others."""
    words = [tokenize([word])[0] for word in known_words()]
    return {*range(SINGLES), *torch.cat(words).flatten().tolist()}


def collect(run: Path, version: str) -> dict[str, Part]:
    """The trained parts of a release, out of a run's folder; of the table of tokens what was trained."""
    parts: dict[str, Part] = {}
    rows = known_rows()
    for part in PARTS_OF[version]:
        stage = STAGE_OF_PART.get(part, "text")
        weights = run / stage / f"{stage}.safetensors"
        if not weights.exists():
            raise ValueError(f"{weights} is missing: train the {stage} first")
        read = read_part(weights, part)
        parts[part] = thinned(read, rows) if part in TOWERS else read
    return parts


def metadata(sampling: Mapping[str, Any], training: Mapping[str, Any], data: DataConfig) -> dict[str, Any]:
    """What a bundle says of itself."""
    return {"vocabulary": vocabulary(data), "sampling": sampling, "licence": LICENCE, "training": training}


def assemble(run: Path, target: Path) -> None:
    """Put the trained stages of a run folder together as one bundle in bf16."""
    parts = collect(run, "v2")
    training = {stage: last_step(run / stage) for stage in STAGES}
    about = metadata(SAMPLING, training, trained_on(RECIPE / "prior.toml"))
    save_bundle(target, parts, about, dtype=torch.bfloat16)


def rows_of(log: Path) -> list[dict[str, Any]]:
    """The rows of a stage's log."""
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    return [json.loads(line) for line in lines]


def last_step(folder: Path) -> dict[str, Any]:
    """The last row of a stage's log."""
    path = folder / "log.jsonl"
    rows = rows_of(path)
    if not rows:
        raise ValueError(f"{path} is missing or empty: train the {folder.name} first")
    return rows[-1]


def keep_logs(run: Path, folder: Path, stages: Iterable[str] = STAGES) -> None:
    """Copy the stages' logs and their last sheets: what the weights came from."""
    folder.mkdir(parents=True, exist_ok=True)
    for stage in stages:
        shutil.copyfile(run / stage / "log.jsonl", folder / f"{stage}.jsonl")
        for sheet in sorted((run / stage).glob("sheet-*.png"))[-1:]:
            Image.open(sheet).convert("RGB").save(folder / f"{stage}.jpg", quality=85)


def told(arguments: Sequence[str] | None, name: str, about: str | None, run: str, target: Path) -> argparse.Namespace:
    """The options of a command that builds a bundle: `run`, `output` and `assemble_only`."""
    parser = argparse.ArgumentParser(prog=f"python -m wuerstchen_core.demo.recipe.{name}", description=about)
    parser.add_argument("--run", type=Path, default=Path(run), help="folder of the run")
    parser.add_argument("--output", type=Path, default=target, help="the bundle")
    parser.add_argument("--assemble-only", action="store_true", help="train nothing, take the weights as they are")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what is not trained yet, then write the bundle."""
    from ...training.run import run

    options = told(arguments, "build", __doc__, "runs/demo", demo_path())
    if not options.assemble_only:
        for stage in STAGES:
            run(stage, RECIPE / f"{stage}.toml", [f"run='{options.run}'"])
    assemble(options.run, options.output)
    if options.output == demo_path():
        keep_logs(options.run, RECIPE / "logs")


if __name__ == "__main__":
    main()
