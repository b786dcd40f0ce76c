"""Retrain the shipped model from nothing: `python -m tools.demo.build [--run DIR]`.

The five stages train one after the other as the TOML files in this folder say, then Stages B and C once more from what
they became, each training going on where it was stopped. The weights become the bundle; the logs of what ships are kept
in `logs`. What depends on the weights is then remade by `remake`.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from wuerstchen_core.checkpoints import PARTS_OF, Part, demo_path, read_part, save_bundle
from wuerstchen_core.checkpoints.bundle import TABLE
from wuerstchen_core.checkpoints.components import TOWERS
from wuerstchen_core.common.dataclass_config import from_table
from wuerstchen_core.demo.vocabulary import COLOURS, SIZES, THINGS, known_words
from wuerstchen_core.models.text_encoder import tokenize
from wuerstchen_core.training.config import read_config
from wuerstchen_core.training.data.demo import DemoDataConfig

RECIPE = Path(__file__).parent
STAGES = ("vqgan", "encoder", "text", "decoder", "prior")  # in this order: later ones need earlier ones
AGAIN = ("decoder", "prior")  # trained on from there, as their second files say: the rate starts anew
STAGE_OF_PART = {
    "vqgan": "vqgan",
    "image_encoder": "encoder",
    "decoder": "decoder",
    "token_decoder": "token-decoder",
    "prior": "prior",
}
# As right as with the published steps, nearer to the drawings, and in a third of the time (docs/steps.md).
SAMPLING = {
    "width": 256,
    "height": 256,
    "schedule": "fast",
    "sampler": "ddim",
    "prior_steps": 6,
    "prior_guidance": 3.0,
    "decoder_steps": 4,
}
SINGLES = 512  # CLIP's first tokens: each byte, inside a word and at its end
LICENCE = "Weights: MIT. Trained on drawings of Google's Noto Emoji (Apache License 2.0), see ARTWORK-LICENSE.txt."


def trained_on(config: Path) -> DemoDataConfig:
    """The pictures that a stage's TOML file names."""
    return from_table(DemoDataConfig, read_config(config, []).get("data", {}), "data")


def vocabulary(data: DemoDataConfig) -> dict[str, Any]:
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


def folders_of(run: Path) -> dict[str, Path]:
    """The folder of each of a run's trainings, by the name of its file."""
    return {stage: run / stage for stage in STAGES} | {f"{stage}_again": run / "again" / stage for stage in AGAIN}


def collect(folders: Mapping[str, Path], version: str) -> dict[str, Part]:
    """The trained parts of a release, out of the stages' folders; of the table of tokens what was trained."""
    parts: dict[str, Part] = {}
    rows = known_rows()
    for part in PARTS_OF[version]:
        stage = STAGE_OF_PART.get(part, "text")
        weights = folders[stage] / f"{stage}.safetensors"
        if not weights.exists():
            raise ValueError(f"{weights} is missing: train the {stage} first")
        read = read_part(weights, part)
        parts[part] = drop_token_rows(read, rows) if part in TOWERS else read
    return parts


def drop_token_rows(tower: Part, rows: Iterable[int]) -> Part:
    """Returns a text tower with only these rows of its token embedding (see `restore_token_rows`)."""
    indices = torch.tensor(sorted(set(rows)), dtype=torch.int32)
    table = tower.state_dict[f"{TABLE}.weight"][indices.long()]
    return replace(tower, state_dict={**tower.state_dict, f"{TABLE}.weight": table, f"{TABLE}.rows": indices})


def metadata(sampling: Mapping[str, Any], training: Mapping[str, Any], data: DemoDataConfig) -> dict[str, Any]:
    """What a bundle says of itself."""
    return {"vocabulary": vocabulary(data), "sampling": sampling, "licence": LICENCE, "training": training}


def assemble(run: Path, target: Path) -> None:
    """Put the trained stages of a run folder together as one bundle in bf16."""
    folders = folders_of(run)
    parts = collect(folders | {stage: folders[f"{stage}_again"] for stage in AGAIN}, "v2")
    training = {name: last_step(folder) for name, folder in folders.items()}
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


def keep_logs(folders: Mapping[str, Path], target: Path) -> None:
    """Copy the trainings' logs and their last sheets into a folder: what the weights came from."""
    target.mkdir(parents=True, exist_ok=True)
    for name, folder in folders.items():
        shutil.copyfile(folder / "log.jsonl", target / f"{name}.jsonl")
        for sheet in sorted(folder.glob("sheet-*.png"))[-1:]:
            Image.open(sheet).convert("RGB").save(target / f"{name}.jpg", quality=85)


def from_first(run: Path, stage: str) -> list[str]:
    """What a stage's second training is told: the weights of its first, and of the stages before it."""
    made = {name: run / name / f"{name}.safetensors" for name in STAGES}
    inputs = [f"inputs.{name}='{made[name]}'" for name in STAGES if name not in AGAIN]
    return [f"run='{run / 'again'}'", f"start='{made[stage]}'", *inputs]


def told(arguments: Sequence[str] | None, name: str, about: str | None, run: str, target: Path) -> argparse.Namespace:
    """The options of a command that builds a bundle: `run`, `output` and `assemble_only`."""
    parser = argparse.ArgumentParser(prog=f"python -m tools.demo.{name}", description=about)
    parser.add_argument("--run", type=Path, default=Path(run), help="folder of the run")
    parser.add_argument("--output", type=Path, default=target, help="the bundle")
    parser.add_argument("--assemble-only", action="store_true", help="train nothing, take the weights as they are")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what is not trained yet, then write the bundle."""
    from wuerstchen_core.training.run import run

    options = told(arguments, "build", __doc__, "runs/demo", demo_path())
    if not options.assemble_only:
        for stage in STAGES:
            run(stage, RECIPE / f"{stage}.toml", [f"run='{options.run}'"])
        for stage in AGAIN:
            run(stage, RECIPE / f"{stage}_again.toml", from_first(options.run, stage))
    assemble(options.run, options.output)
    if options.output == demo_path():
        keep_logs(folders_of(options.run), RECIPE / "logs")


if __name__ == "__main__":
    main()
